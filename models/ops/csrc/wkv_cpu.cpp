// The WKV recurrence of wkv.h over (B, T, C) arrays on a CPU, behind a C interface for ctypes.
//
// A tile is one batch row and up to WIDTH channels: the compiler turns the loop over its channels
// into vector code, and threads take tiles. All arrays are contiguous.
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "wkv_scalar.h"

namespace {

using wkv::Adjoint;
using wkv::BFloat16;
using wkv::Half;
using wkv::Scalar;
using wkv::State;
using wkv::StepGradients;
using wkv::load;
using wkv::store;

constexpr int64_t WIDTH = 64;  // channels in a tile
constexpr int64_t CHUNK = 16;  // steps whose states the backward pass holds at once
constexpr int64_t AHEAD = 4;   // steps that memory is asked for in advance

// A tile's rows lie C apart, often a page each, which no hardware prefetcher follows.
template <int WRITE, typename IO>
WKV_FN void prefetch(const IO* row, int64_t n) {
  constexpr int64_t LINE = 64 / int64_t(sizeof(IO));
  for (int64_t c = 0; c < n; c += LINE) __builtin_prefetch(row + c, WRITE);
}

// State and adjoint of a tile, channels side by side.
template <typename S>
struct TileState {
  S num[WIDTH], den[WIDTH], top[WIDTH], age[WIDTH];

  WKV_FN State<S> get(int64_t c) const { return {num[c], den[c], top[c], age[c]}; }
  WKV_FN void set(int64_t c, const State<S>& s) {
    num[c] = s.num;
    den[c] = s.den;
    top[c] = s.top;
    age[c] = s.age;
  }
};

template <typename S>
struct Arrays {  // what both directions read
  int64_t B, T, C;
  const S *w, *u;
  const void *k, *v;
  const S* state;  // (B, 3, C), or null when empty

  int64_t tiles_per_row() const { return (C + WIDTH - 1) / WIDTH; }
};

struct Tile {
  int64_t b, c, n;

  template <typename S>
  Tile(const Arrays<S>& a, int64_t index)
      : b(index / a.tiles_per_row()), c(index % a.tiles_per_row() * WIDTH) {
    n = a.C - c < WIDTH ? a.C - c : WIDTH;
  }
};

template <typename S>
void load_state(const Arrays<S>& a, const Tile& tile, TileState<S>& s) {
  const S* from = a.state ? a.state + tile.b * 3 * a.C + tile.c : nullptr;
  for (int64_t c = 0; c < tile.n; ++c) {
    if (from)
      s.set(c, {from[c], from[a.C + c], from[2 * a.C + c], S(0)});
    else
      s.set(c, {S(0), S(0), S(wkv::EMPTY), S(0)});
  }
}

template <typename S>
struct Forward : Arrays<S> {
  void* y;
  S* last;  // (B, 3, C)
};

template <typename IO, typename S>
void forward_rows(int64_t T, int64_t C, int64_t n, const S* __restrict w, const S* __restrict u,
                  const IO* __restrict k, const IO* __restrict v, IO* __restrict y,
                  TileState<S>& __restrict s) {
  for (int64_t t = 0; t < T; ++t, k += C, v += C, y += C) {
    prefetch<0>(k + AHEAD * C, n);
    prefetch<0>(v + AHEAD * C, n);
    prefetch<1>(y + AHEAD * C, n);
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) {
      State<S> x{s.num[c], s.den[c], s.top[c], s.age[c]};
      store(y[c], wkv::forward_step<S>(x, w[c], u[c], load(k[c]), load(v[c])));
      s.num[c] = x.num;
      s.den[c] = x.den;
      s.top[c] = x.top;
      s.age[c] = x.age;
    }
  }
}

template <typename IO, typename S = typename Scalar<IO>::type>
void forward_tile(const Forward<S>& a, int64_t index) {
  const Tile tile(a, index);
  const int64_t at = tile.b * a.T * a.C + tile.c;
  TileState<S> s;
  load_state(a, tile, s);
  forward_rows<IO, S>(a.T, a.C, tile.n, a.w + tile.c, a.u + tile.c,
                      static_cast<const IO*>(a.k) + at, static_cast<const IO*>(a.v) + at,
                      static_cast<IO*>(a.y) + at, s);
  S* last = a.last + tile.b * 3 * a.C + tile.c;
  for (int64_t c = 0; c < tile.n; ++c) {
    last[c] = s.num[c];
    last[a.C + c] = s.den[c];
    last[2 * a.C + c] = wkv::exponent<S>(s.get(c), a.w[tile.c + c]);
  }
}

template <typename S>
struct Backward : Arrays<S> {
  const void* gy;
  const S* g_last;    // (B, 3, C), or null when zero
  S *gw, *gu;         // (B, C)
  void *gk, *gv;      // (B, T, C)
  S* g_first;         // (B, 3, C)
};

template <typename S>
struct TileAdjoint {
  S num[WIDTH], den[WIDTH], p[WIDTH], gw[WIDTH], gu[WIDTH];
};

// Advances s over n_steps, keeping the state before each in `before` when that is given.
template <typename IO, typename S>
void replay(int64_t n_steps, int64_t C, int64_t n, const S* __restrict w, const IO* __restrict k,
            const IO* __restrict v, TileState<S>& __restrict s, TileState<S>* __restrict before) {
  for (int64_t t = 0; t < n_steps; ++t, k += C, v += C) {
    prefetch<0>(k + AHEAD * C, n);
    prefetch<0>(v + AHEAD * C, n);
    if (before) before[t] = s;
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) {
      State<S> x{s.num[c], s.den[c], s.top[c], s.age[c]};
      wkv::advance<S>(x, w[c], load(k[c]), load(v[c]));
      s.num[c] = x.num;
      s.den[c] = x.den;
      s.top[c] = x.top;
      s.age[c] = x.age;
    }
  }
}

template <typename IO, typename S>
void backward_rows(int64_t n_steps, int64_t C, int64_t n, const S* __restrict w,
                   const S* __restrict u, const IO* __restrict k, const IO* __restrict v,
                   const IO* __restrict gy, IO* __restrict gk, IO* __restrict gv,
                   const TileState<S>* __restrict before, TileAdjoint<S>& __restrict g) {
  S gw[WIDTH] = {}, gu[WIDTH] = {};  // sums of a chunk first: fewer roundings over a long T
  for (int64_t t = n_steps - 1; t >= 0; --t) {
    const TileState<S>& s = before[t];
    const int64_t at = t * C;
    prefetch<0>(gy + at - AHEAD * C, n);
    prefetch<1>(gk + at - AHEAD * C, n);
    prefetch<1>(gv + at - AHEAD * C, n);
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) {
      Adjoint<S> x{g.num[c], g.den[c], g.p[c]};
      const State<S> state{s.num[c], s.den[c], s.top[c], s.age[c]};
      const StepGradients<S> step = wkv::backward_step<S>(
          state, x, w[c], u[c], load(k[at + c]), load(v[at + c]), load(gy[at + c]));
      store(gk[at + c], step.k);
      store(gv[at + c], step.v);
      gw[c] += step.w;
      gu[c] += step.u;
      g.num[c] = x.num;
      g.den[c] = x.den;
      g.p[c] = x.p;
    }
  }
  for (int64_t c = 0; c < n; ++c) {
    g.gw[c] += gw[c];
    g.gu[c] += gu[c];
  }
}

template <typename IO, typename S = typename Scalar<IO>::type>
void backward_tile(const Backward<S>& a, int64_t index) {
  const Tile tile(a, index);
  const int64_t row = tile.b * a.T * a.C + tile.c, state_row = tile.b * 3 * a.C + tile.c;
  const int64_t n_chunks = (a.T + CHUNK - 1) / CHUNK, C = a.C, n = tile.n;
  const S *w = a.w + tile.c, *u = a.u + tile.c;
  const IO *k = static_cast<const IO*>(a.k) + row, *v = static_cast<const IO*>(a.v) + row;
  const IO* gy = static_cast<const IO*>(a.gy) + row;
  IO *gk = static_cast<IO*>(a.gk) + row, *gv = static_cast<IO*>(a.gv) + row;
  const auto steps = [&](int64_t i) { return i + 1 < n_chunks ? CHUNK : a.T - i * CHUNK; };

  std::unique_ptr<TileState<S>[]> states(new TileState<S>[n_chunks + CHUNK]);
  TileState<S>* borders = states.get();           // the state before each chunk
  TileState<S>* before = borders + n_chunks;      // the state before each step of one chunk
  TileState<S> s;
  load_state(a, tile, s);
  for (int64_t i = 0; i < n_chunks; ++i) {
    borders[i] = s;
    replay<IO, S>(steps(i), C, n, w, k + i * CHUNK * C, v + i * CHUNK * C, s, nullptr);
  }

  TileAdjoint<S> g{};
  for (int64_t c = 0; a.g_last && c < n; ++c) {
    const S* last = a.g_last + state_row + c;
    const Adjoint<S> x = wkv::enter<S>(s.get(c), last[0], last[C], last[2 * C]);
    g.num[c] = x.num;
    g.den[c] = x.den;
    g.p[c] = x.p;
    g.gw[c] = x.p * s.age[c];
  }
  for (int64_t i = n_chunks - 1; i >= 0; --i) {
    const int64_t at = i * CHUNK * C;
    s = borders[i];
    replay<IO, S>(steps(i), C, n, w, k + at, v + at, s, before);
    backward_rows<IO, S>(steps(i), C, n, w, u, k + at, v + at, gy + at, gk + at, gv + at, before, g);
  }

  S* first = a.g_first + state_row;
  for (int64_t c = 0; c < n; ++c) {
    a.gw[tile.b * C + tile.c + c] = g.gw[c];
    a.gu[tile.b * C + tile.c + c] = g.gu[c];
    first[c] = g.num[c];
    first[C + c] = g.den[c];
    first[2 * C + c] = wkv::leave<S>(borders[0].get(c), {g.num[c], g.den[c], g.p[c]});
  }
}

// GOMP_parallel of the OpenMP runtime that PyTorch runs on, so that both share one pool of threads.
using Fork = void (*)(void (*)(void*), void*, unsigned, unsigned);

template <typename Call>
struct Job {
  const Call& call;
  int64_t n_tiles;
  std::atomic<int64_t> next{0};
  std::atomic<bool> out_of_memory{false};

  static void work(void* self) {
    Job& job = *static_cast<Job*>(self);
    try {
      for (int64_t i; (i = job.next++) < job.n_tiles;) job.call(i);
    } catch (const std::bad_alloc&) {
      job.out_of_memory = true;
    }
  }
};

template <typename Call>
int over_tiles(int64_t n_tiles, int64_t n_threads, Fork fork, const Call& call) {
  Job<Call> job{call, n_tiles};
  if (n_threads > n_tiles) n_threads = n_tiles;
  if (n_threads > 1 && fork) {
    fork(Job<Call>::work, &job, unsigned(n_threads), 0);
  } else {
    std::vector<std::thread> others;
    try {
      while (int64_t(others.size()) + 1 < n_threads) others.emplace_back(Job<Call>::work, &job);
    } catch (const std::system_error&) {  // fewer threads, same result
    }
    Job<Call>::work(&job);
    for (std::thread& other : others) other.join();
  }
  return job.out_of_memory ? 1 : 0;
}

template <typename Run>
int for_dtype(int dtype, const Run& run) {
  switch (dtype) {  // the order of DTYPES in cpu.py
    case 0: return run(float{});
    case 1: return run(Half{});
    case 2: return run(BFloat16{});
    case 3: return run(double{});
  }
  return 2;
}

}  // namespace

// Both return 0, or 1 when memory ran out; `state` and `g_last` may be null.
extern "C" int wkv_forward(int dtype, int64_t B, int64_t T, int64_t C, const void* w, const void* u,
                           const void* k, const void* v, const void* state, void* y, void* last,
                           int64_t n_threads, void* fork) {
  return for_dtype(dtype, [&](auto io) {
    using IO = decltype(io);
    using S = typename Scalar<IO>::type;
    const Forward<S> a{{B, T, C, static_cast<const S*>(w), static_cast<const S*>(u), k, v,
                        static_cast<const S*>(state)},
                       y,
                       static_cast<S*>(last)};
    return over_tiles(B * a.tiles_per_row(), n_threads, reinterpret_cast<Fork>(fork),
                      [&](int64_t i) { forward_tile<IO>(a, i); });
  });
}

extern "C" int wkv_backward(int dtype, int64_t B, int64_t T, int64_t C, const void* w,
                            const void* u, const void* k, const void* v, const void* state,
                            const void* gy, const void* g_last, void* gw, void* gu, void* gk,
                            void* gv, void* g_first, int64_t n_threads, void* fork) {
  return for_dtype(dtype, [&](auto io) {
    using IO = decltype(io);
    using S = typename Scalar<IO>::type;
    const Backward<S> a{{B, T, C, static_cast<const S*>(w), static_cast<const S*>(u), k, v,
                         static_cast<const S*>(state)},
                        gy,
                        static_cast<const S*>(g_last),
                        static_cast<S*>(gw),
                        static_cast<S*>(gu),
                        gk,
                        gv,
                        static_cast<S*>(g_first)};
    return over_tiles(B * a.tiles_per_row(), n_threads, reinterpret_cast<Fork>(fork),
                      [&](int64_t i) { backward_tile<IO>(a, i); });
  });
}

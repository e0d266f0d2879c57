// The WKV recurrence of wkv.h over (B, T, C) arrays on a CPU, behind a C interface for ctypes.
//
// A tile is one batch row and up to WIDTH channels: the compiler turns the loop over its channels
// into vector code. A thread takes a group of neighbouring tiles and goes through them a chunk of
// steps at a time, so that it reads whole stretches of memory. Where groups are fewer than threads,
// T is cut into segments too: each is reduced on its own, the states before them are combined, then
// each is applied; backward once more for the adjoints. All arrays are contiguous.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "parallel.h"
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
using parallel::Fork;
using parallel::in_parallel;

constexpr int64_t WIDTH = 64;      // most channels of a tile
constexpr int64_t NARROW = 32;     // least where threads lack work; fewer yet wait on each other
constexpr int64_t TILES = 12;      // most tiles of a group
constexpr int64_t CHUNK = 32;      // steps before the next tile's turn; backward holds their states
constexpr int64_t AHEAD = 4;       // steps that memory is asked for in advance
constexpr int64_t SEGMENT = 256;   // least steps that are worth a segment
constexpr int64_t ERRAND = 128;    // steps of a tile that are worth waking a thread

// Asks for a row of a tile that is needed soon: rows lie C apart, often a page each, which no
// hardware prefetcher follows. NEAR: into the first level of the cache, too small for a chunk.
template <bool NEAR, typename IO>
WKV_FN void prefetch(const IO* row, int64_t n_channels) {
  constexpr int64_t LINE = 64 / int64_t(sizeof(IO));
  const int64_t n = std::min(n_channels, WIDTH);  // known, it lets loops unroll
  for (int64_t c = 0; c < n; c += LINE) __builtin_prefetch(row + c, 0, NEAR ? 3 : 2);
  __builtin_prefetch(row + n - 1, 0, NEAR ? 3 : 2);  // rows need not begin with a line
}

// State and adjoint of a tile, channels side by side.
template <typename S>
struct alignas(64) TileState {
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
};

// How the work is cut: a unit is a batch row and a group of tiles.
struct Plan {
  int64_t T, C, n_threads, width, group, n_tiles, n_groups, n_units, segment, n_segments;

  Plan(int64_t B, int64_t T, int64_t C, int64_t most_threads) : T(T), C(C) {
    const auto parts = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
    const int64_t worthwhile = std::max<int64_t>(1, B * T * parts(C, WIDTH) / ERRAND);
    n_threads = std::min(most_threads, worthwhile);
    width = WIDTH;
    while (width > NARROW && B * parts(C, width) < n_threads) width /= 2;
    // the widest groups that leave no thread idle for long
    const int64_t row = parts(C, width);
    double best = 0;
    for (int64_t tiles = std::min(TILES, row); tiles > 0 && best < 0.9; --tiles) {
      const int64_t rounds = parts(B * parts(row, tiles), n_threads);
      const double busy = double(B * row) / double(rounds * n_threads * tiles);
      if (busy > best) {
        best = busy;
        group = width * tiles;
      }
    }
    n_tiles = group / width;
    n_groups = parts(C, group);
    n_units = B * n_groups;
    const int64_t most = T < SEGMENT ? 1 : T / SEGMENT, wanted = parts(n_threads, n_units);
    segment = parts(parts(T, std::min(wanted, most)), CHUNK) * CHUNK;
    n_segments = parts(T, segment);
  }
};

// A segment of a unit; calls work(tile number, first channel, number of channels) for its tiles.
struct Part {
  int64_t b, c, end_c, width, t, end_t, unit, number;

  Part(const Plan& plan, int64_t index)
      : b(index / plan.n_segments / plan.n_groups),
        c(index / plan.n_segments % plan.n_groups * plan.group),
        end_c(plan.C - c < plan.group ? plan.C : c + plan.group),
        width(plan.width),
        t(index % plan.n_segments * plan.segment),
        end_t(plan.T - t < plan.segment ? plan.T : t + plan.segment),
        unit(index / plan.n_segments),
        number(index % plan.n_segments) {}

  template <typename Work>
  void tiles(const Work& work) const {
    for (int64_t i = 0, at = c; at < end_c; ++i, at += width)
      work(i, at, end_c - at < width ? end_c - at : width);
  }
};

// States or adjoints of the tiles of a unit at the borders of its segments, zero at first. A single
// segment needs none: new memory for all units at once costs more than short sequences themselves.
template <typename X>
struct Borders {
  int64_t n_tiles, n_borders;
  std::vector<X> all;

  explicit Borders(const Plan& plan)
      : n_tiles(plan.n_tiles),
        n_borders(plan.n_segments > 1 ? plan.n_segments + 1 : 0),
        all(plan.n_units * n_borders * n_tiles) {}
  X* at(int64_t unit, int64_t border) { return &all[(unit * n_borders + border) * n_tiles]; }
};

template <typename S>
void load_state(const Arrays<S>& a, const Part& part, TileState<S>* states) {
  part.tiles([&](int64_t i, int64_t c, int64_t n) {
    const S* from = a.state ? a.state + part.b * 3 * a.C + c : nullptr;
    for (int64_t j = 0; j < n; ++j)
      states[i].set(j, from ? State<S>{from[j], from[a.C + j], from[2 * a.C + j], S(0)}
                            : State<S>{S(0), S(0), S(wkv::EMPTY), S(0)});
  });
}

// The states of a part's tiles before its first step; `ends` has them where segments are several.
template <typename S>
std::vector<TileState<S>> states_before(const Arrays<S>& a, const Plan& plan, const Part& part,
                                        Borders<TileState<S>>& ends) {
  std::vector<TileState<S>> states(plan.n_tiles);
  if (plan.n_segments == 1) {
    load_state(a, part, states.data());
  } else {
    std::copy_n(ends.at(part.unit, part.number), plan.n_tiles, states.data());
  }
  return states;
}

template <typename S>
struct Forward : Arrays<S> {
  void* y;
  S* last;  // (B, 3, C)
};

template <typename IO, typename S>
void forward_rows(int64_t T, int64_t C, int64_t n_channels, const S* __restrict w,
                  const S* __restrict u, const IO* __restrict k, const IO* __restrict v,
                  IO* __restrict y, TileState<S>& __restrict s) {
  const int64_t n = std::min(n_channels, WIDTH);
  for (int64_t t = 0; t < T; ++t, k += C, v += C, y += C) {
    prefetch<true>(k + AHEAD * C, n);
    prefetch<true>(v + AHEAD * C, n);
    prefetch<true>(y + AHEAD * C, n);
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

// Brings the states of a part from its first step past its last, and writes y.
template <typename IO, typename S = typename Scalar<IO>::type>
void forward_part(const Forward<S>& a, const Part& part, TileState<S>* states) {
  for (int64_t t = part.t; t < part.end_t; t += CHUNK)
    part.tiles([&](int64_t i, int64_t c, int64_t n) {
      const int64_t at = (part.b * a.T + t) * a.C + c;
      forward_rows<IO, S>(std::min(CHUNK, part.end_t - t), a.C, n, a.w + c, a.u + c,
                          static_cast<const IO*>(a.k) + at, static_cast<const IO*>(a.v) + at,
                          static_cast<IO*>(a.y) + at, states[i]);
    });
}

template <typename S>
void store_last(const Forward<S>& a, const Part& part, const TileState<S>* states) {
  part.tiles([&](int64_t i, int64_t c, int64_t n) {
    S* last = a.last + part.b * 3 * a.C + c;
    for (int64_t j = 0; j < n; ++j) {
      last[j] = states[i].num[j];
      last[a.C + j] = states[i].den[j];
      last[2 * a.C + j] = wkv::exponent<S>(states[i].get(j), a.w[c + j]);
    }
  });
}

template <typename S>
struct Backward : Arrays<S> {
  const void* gy;
  const S* g_last;    // (B, 3, C)
  S *gw, *gu;         // (B, C)
  void *gk, *gv;      // (B, T, C)
  S* g_first;         // (B, 3, C)
};

template <typename S>
struct alignas(64) TileAdjoint {  // and the sums of the gradients of w and u
  S num[WIDTH], den[WIDTH], p[WIDTH], gw[WIDTH], gu[WIDTH];

  WKV_FN Adjoint<S> get(int64_t c) const { return {num[c], den[c], p[c]}; }
  WKV_FN void set(int64_t c, const Adjoint<S>& g) {
    num[c] = g.num;
    den[c] = g.den;
    p[c] = g.p;
  }
};

// Advances s over n_steps; calls ahead(t, s) before step t.
template <typename IO, typename S, typename Ahead>
void replay(int64_t n_steps, int64_t C, int64_t n_channels, const S* __restrict w,
            const IO* __restrict k, const IO* __restrict v, TileState<S>& __restrict s,
            const Ahead& ahead) {
  const int64_t n = std::min(n_channels, WIDTH);
  for (int64_t t = 0; t < n_steps; ++t, k += C, v += C) {
    ahead(t, s);
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

// Takes g from behind n_steps to before them; apply = false: writes no gradients.
template <bool apply, typename IO, typename S>
void backward_rows(int64_t n_steps, int64_t C, int64_t n_channels, const S* __restrict w,
                   const S* __restrict u, const IO* __restrict k, const IO* __restrict v,
                   const IO* __restrict gy, IO* __restrict gk, IO* __restrict gv,
                   const TileState<S>* __restrict before, TileAdjoint<S>& __restrict g) {
  const int64_t n = std::min(n_channels, WIDTH);
  S gw[WIDTH] = {}, gu[WIDTH] = {};  // sums of a chunk first: fewer roundings over a long T
  for (int64_t t = n_steps - 1; t >= 0; --t) {
    const TileState<S>& s = before[t];
    const int64_t at = t * C;
    prefetch<false>(k + at - CHUNK * C, n);  // what the replay of the chunk before needs
    prefetch<false>(v + at - CHUNK * C, n);
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) {
      Adjoint<S> x{g.num[c], g.den[c], g.p[c]};
      const State<S> state{s.num[c], s.den[c], s.top[c], s.age[c]};
      const StepGradients<S> step = wkv::backward_step<S>(
          state, x, w[c], u[c], load(k[at + c]), load(v[at + c]), load(gy[at + c]));
      if (apply) {
        store(gk[at + c], step.k);
        store(gv[at + c], step.v);
        gw[c] += step.w;
        gu[c] += step.u;
      }
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

// Brings the states of a part from its first step past its last; into `borders`, if given, those
// before each chunk, tile by tile.
template <typename IO, typename S = typename Scalar<IO>::type>
void replay_part(const Arrays<S>& a, const Part& part, TileState<S>* states,
                 TileState<S>* borders) {
  const int64_t n_chunks = (part.end_t - part.t + CHUNK - 1) / CHUNK;
  for (int64_t t = part.t; t < part.end_t; t += CHUNK)
    part.tiles([&](int64_t i, int64_t c, int64_t n) {
      const int64_t at = (part.b * a.T + t) * a.C + c;
      const IO *k = static_cast<const IO*>(a.k) + at, *v = static_cast<const IO*>(a.v) + at;
      if (borders) borders[i * n_chunks + (t - part.t) / CHUNK] = states[i];
      replay<IO, S>(std::min(CHUNK, part.end_t - t), a.C, n, a.w + c, k, v, states[i],
                    [&](int64_t step, const TileState<S>&) {
                      prefetch<true>(k + (step + AHEAD) * a.C, n);
                      prefetch<true>(v + (step + AHEAD) * a.C, n);
                    });
    });
}

// Takes the adjoints g of a part from behind its last step to before its first. `states` are those
// before its first step and come back as those past its last. end: g is made there, of g_last.
template <bool apply, typename IO, typename S = typename Scalar<IO>::type>
void backward_part(const Backward<S>& a, const Part& part, bool end, TileState<S>* states,
                   TileAdjoint<S>* g) {
  const int64_t n_chunks = (part.end_t - part.t + CHUNK - 1) / CHUNK;
  const int64_t n_tiles = (part.end_c - part.c + part.width - 1) / part.width;
  std::unique_ptr<TileState<S>[]> room(new TileState<S>[n_tiles * n_chunks + CHUNK]);
  TileState<S>* borders = room.get();                      // the state before each chunk
  TileState<S>* before = borders + n_tiles * n_chunks;     // before each step of one chunk
  replay_part<IO>(a, part, states, borders);
  if (end)
    part.tiles([&](int64_t i, int64_t c, int64_t n) {
      const S* last = a.g_last + part.b * 3 * a.C + c;
      for (int64_t j = 0; j < n; ++j) {
        const State<S> s = states[i].get(j);
        const Adjoint<S> x = wkv::enter<S>(s, last[j], last[a.C + j], last[2 * a.C + j]);
        g[i].set(j, x);
        g[i].gw[j] = x.p * s.age;
      }
    });
  for (int64_t chunk = n_chunks - 1; chunk >= 0; --chunk)
    part.tiles([&](int64_t i, int64_t c, int64_t n) {
      const int64_t t = part.t + chunk * CHUNK, steps = std::min(CHUNK, part.end_t - t);
      const int64_t at = (part.b * a.T + t) * a.C + c;
      const IO *k = static_cast<const IO*>(a.k) + at, *v = static_cast<const IO*>(a.v) + at;
      const IO* gy = static_cast<const IO*>(a.gy) + at;
      IO *gk = static_cast<IO*>(a.gk) + at, *gv = static_cast<IO*>(a.gv) + at;
      TileState<S> state = borders[i * n_chunks + chunk];
      replay<IO, S>(steps, a.C, n, a.w + c, k, v, state,
                    [&](int64_t step, const TileState<S>& s) {
                      before[step] = s;
                      prefetch<false>(gy + step * a.C, n);
                      if (!apply) return;
                      prefetch<false>(gk + step * a.C, n);
                      prefetch<false>(gv + step * a.C, n);
                    });
      backward_rows<apply, IO, S>(steps, a.C, n, a.w + c, a.u + c, k, v, gy, gk, gv, before, g[i]);
    });
}

// The gradients of w and u, (B, C), and of the first state, once all parts of a unit are done. g is
// what they made of their adjoints, a row of tiles for each; `part` is any of them.
template <typename S>
void store_gradients(const Backward<S>& a, const Plan& plan, const Part& part,
                     const TileAdjoint<S>* g) {
  std::vector<TileState<S>> first(plan.n_tiles);
  load_state(a, part, first.data());
  part.tiles([&](int64_t i, int64_t c, int64_t n) {
    S *gw = a.gw + part.b * a.C + c, *gu = a.gu + part.b * a.C + c;
    S* to = a.g_first + part.b * 3 * a.C + c;
    for (int64_t j = 0; j < n; ++j) {
      gw[j] = gu[j] = S(0);
      for (int64_t s = 0; s < plan.n_segments; ++s) {
        gw[j] += g[s * plan.n_tiles + i].gw[j];
        gu[j] += g[s * plan.n_tiles + i].gu[j];
      }
      const Adjoint<S> x = g[i].get(j);
      to[j] = x.num;
      to[a.C + j] = x.den;
      to[2 * a.C + j] = wkv::leave<S>(first[i].get(j), x);
    }
  });
}

// The state before each segment of each unit and, after the last, that past it. Only called where
// there are several: reducing a segment costs about half of applying it.
template <typename IO, typename S>
bool find_ends(const Arrays<S>& a, const Plan& plan, Fork fork, Borders<TileState<S>>& ends) {
  Arrays<S> nothing = a;
  nothing.state = nullptr;
  if (!in_parallel(plan.n_units * plan.n_segments, plan.n_threads, fork, [&](int64_t i) {
        const Part part(plan, i);
        TileState<S>* s = ends.at(part.unit, part.number + 1);
        load_state(nothing, part, s);
        replay_part<IO>(a, part, s, static_cast<TileState<S>*>(nullptr));
      }))
    return false;
  for (int64_t i = 0; i < plan.n_units * plan.n_segments; ++i) {
    const Part part(plan, i);
    TileState<S>* before = ends.at(part.unit, part.number);
    TileState<S>* after = ends.at(part.unit, part.number + 1);
    if (part.number == 0) load_state(a, part, before);
    part.tiles([&](int64_t tile, int64_t c, int64_t n) {
      for (int64_t j = 0; j < n; ++j)
        after[tile].set(j, wkv::join<S>(before[tile].get(j), after[tile].get(j), a.w[c + j],
                                        S(part.end_t - part.t)));
    });
  }
  return true;
}

template <typename IO, typename S = typename Scalar<IO>::type>
bool forward(const Forward<S>& a, int64_t n_threads, Fork fork) {
  const Plan plan(a.B, a.T, a.C, n_threads);
  Borders<TileState<S>> ends(plan);
  if (plan.n_segments > 1 && !find_ends<IO, S>(a, plan, fork, ends)) return false;
  return in_parallel(plan.n_units * plan.n_segments, plan.n_threads, fork, [&](int64_t i) {
    const Part part(plan, i);
    std::vector<TileState<S>> states = states_before<S>(a, plan, part, ends);
    forward_part<IO>(a, part, states.data());
    if (part.end_t == a.T) store_last(a, part, states.data());
  });
}

// The adjoint behind each segment but the last, whose own comes from g_last.
template <typename IO, typename S>
bool find_adjoints(const Backward<S>& a, const Plan& plan, Fork fork, Borders<TileState<S>>& ends,
                   Borders<TileAdjoint<S>>& adjoints) {
  Borders<TileAdjoint<S>> own(plan);  // what a segment adds to an adjoint of zero behind it
  if (!in_parallel(plan.n_units * plan.n_segments, plan.n_threads, fork, [&](int64_t i) {
        const Part part(plan, i);
        if (part.number == 0) return;
        std::vector<TileState<S>> states = states_before<S>(a, plan, part, ends);
        backward_part<false, IO>(a, part, part.end_t == a.T, states.data(),
                                 own.at(part.unit, part.number));
      }))
    return false;
  for (int64_t i = plan.n_units * plan.n_segments - 1; i >= 0; --i) {
    const Part part(plan, i);
    if (part.number == 0) continue;
    const TileAdjoint<S>* mine = own.at(part.unit, part.number);
    const TileState<S>* before = ends.at(part.unit, part.number);
    const TileState<S>* after = ends.at(part.unit, part.number + 1);
    const TileAdjoint<S>* behind = adjoints.at(part.unit, part.number);
    TileAdjoint<S>* to = adjoints.at(part.unit, part.number - 1);
    part.tiles([&](int64_t tile, int64_t c, int64_t n) {
      for (int64_t j = 0; j < n; ++j) {
        Adjoint<S> g = mine[tile].get(j);
        if (part.end_t < a.T)
          g = wkv::join<S>(g, wkv::passage<S>(before[tile].get(j), after[tile].get(j), a.w[c + j],
                                              S(part.end_t - part.t)),
                           behind[tile].get(j));
        to[tile].set(j, g);
      }
    });
  }
  return true;
}

template <typename IO, typename S = typename Scalar<IO>::type>
bool backward(const Backward<S>& a, int64_t n_threads, Fork fork) {
  const Plan plan(a.B, a.T, a.C, n_threads);
  Borders<TileState<S>> ends(plan);
  Borders<TileAdjoint<S>> adjoints(plan);
  const auto walk = [&](const Part& part, TileAdjoint<S>* g) {
    std::vector<TileState<S>> states = states_before<S>(a, plan, part, ends);
    backward_part<true, IO>(a, part, part.end_t == a.T, states.data(), g);
  };
  if (plan.n_segments == 1)
    return in_parallel(plan.n_units, plan.n_threads, fork, [&](int64_t unit) {
      const Part part(plan, unit);
      std::vector<TileAdjoint<S>> g(plan.n_tiles);
      walk(part, g.data());
      store_gradients(a, plan, part, g.data());
    });
  const bool done = find_ends<IO, S>(a, plan, fork, ends) &&
                    find_adjoints<IO, S>(a, plan, fork, ends, adjoints) &&
                    in_parallel(plan.n_units * plan.n_segments, plan.n_threads, fork,
                                [&](int64_t i) {
                                  const Part part(plan, i);
                                  walk(part, adjoints.at(part.unit, part.number));
                                });
  for (int64_t unit = 0; done && unit < plan.n_units; ++unit)
    store_gradients(a, plan, Part(plan, unit * plan.n_segments), adjoints.at(unit, 0));
  return done;
}

template <typename Run>
int run_or_fail(const Run& run) {
  try {
    return run() ? 0 : 1;
  } catch (const std::bad_alloc&) {
    return 1;
  }
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

// Both return 0, or 1 when memory ran out; `state` may be null.
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
    return run_or_fail([&] { return forward<IO>(a, n_threads, reinterpret_cast<Fork>(fork)); });
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
    return run_or_fail([&] { return backward<IO>(a, n_threads, reinterpret_cast<Fork>(fork)); });
  });
}

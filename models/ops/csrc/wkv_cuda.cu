// The WKV recurrence of wkv.h over (B, T, C) arrays on a GPU: one source, compiled by NVRTC for one
// element type, WKV_IO. All arrays are contiguous; every argument is a pointer or a long long.
//
// A block owns one batch row, LANES neighbouring channels and one segment of T. It walks through
// the segment in chunks of SPANS x STEPS steps that it holds in shared memory: thread (lane, span)
// first reduces its STEPS steps from an empty state, then joins what the spans before it found,
// then applies the recurrence to its own steps. So time is parallel within a block, every element
// is read once and written once, and no thread keeps an array of length T.
//
// Where B x C alone cannot fill the GPU, T is also cut into segments, each a block of its own:
// wkv_reduce (what each segment does to an empty state), wkv_combine (the state before each
// segment), then wkv_forward. Backward does the same, and once more for the adjoints in reverse.
//
// Traffic in arrays of (B, T, C), and arithmetic per element in float32 operations with an exp as
// 14, of which a step makes 1 (reduce) or 2 (apply): an estimate by counting, not a measurement.
//   forward           read k, v; write y                         3, with segments 5    about 110
//   backward          read k, v twice, gy; write gk, gv          7, with segments 10   about 260
// At 3.35 TB/s and 67 TFLOP/s (an H100's data sheet) (8, 1024, 768) in float32 cannot take less
// than 23 us forward, bound by memory, and 53 us backward.
#include "wkv_scalar.h"

using wkv::Adjoint;
using wkv::Passage;
using wkv::State;
using IO = WKV_IO;
using S = wkv::Scalar<IO>::type;
using Int = long long;

#define WKV_DEVICE __device__ __forceinline__

constexpr int LANES = 32;                       // channels of a block, neighbours in memory
constexpr int SPANS = 8;                        // parts of a chunk that run side by side
constexpr int STEPS = sizeof(IO) == 8 ? 4 : 8;  // steps of a span
constexpr int CHUNK = SPANS * STEPS;
constexpr int THREADS = LANES * SPANS;
constexpr int PACK = 16 / sizeof(IO);                   // elements of one 16-byte access
constexpr int PACKS_PER_ROW = LANES / PACK;             // a row is one step of a tile
constexpr int PACKS = CHUNK * PACKS_PER_ROW / THREADS;  // of one tile, for each thread

// Blocks a multiprocessor holds at least, which bounds the registers of a thread. Left to itself the
// compiler aims higher and spills.
constexpr int BLOCKS_FORWARD = sizeof(S) == 8 ? 2 : 3, BLOCKS_BACKWARD = sizeof(S) == 8 ? 1 : 2;

struct alignas(16) Pack {
  IO x[PACK];
};

struct alignas(16) Tile {
  IO x[CHUNK][LANES];
};

// States of spans in shared memory, a row each. Two barriers lie between any two uses by different
// threads.
template <int ROWS>
struct SharedStates {
  S x[4][ROWS][LANES];

  WKV_DEVICE void put(int row, int lane, S a, S b, S c, S d) {
    x[0][row][lane] = a;
    x[1][row][lane] = b;
    x[2][row][lane] = c;
    x[3][row][lane] = d;
  }
  WKV_DEVICE void put(int row, int lane, const State<S>& s) {
    put(row, lane, s.num, s.den, s.top, s.age);
  }
  WKV_DEVICE State<S> state(int row, int lane) const {
    return {x[0][row][lane], x[1][row][lane], x[2][row][lane], x[3][row][lane]};
  }
};

WKV_DEVICE State<S> empty() { return {S(0), S(0), S(wkv::EMPTY), S(0)}; }

// Entry `row` of an array (rows, 4, C) of states; (rows, 3, C) where the age is folded in.
WKV_DEVICE State<S> load_state(const S* from, Int row, Int C, Int c) {
  from += row * 4 * C + c;
  return {from[0], from[C], from[2 * C], from[3 * C]};
}
WKV_DEVICE void store_state(S* to, Int row, Int C, Int c, const State<S>& s) {
  to += row * 4 * C + c;
  to[0] = s.num;
  to[C] = s.den;
  to[2 * C] = s.top;
  to[3 * C] = s.age;
}
WKV_DEVICE State<S> given_state(const S* state, Int b, Int C, Int c) {
  if (!state) return empty();
  state += b * 3 * C + c;
  return {state[0], state[C], state[2 * C], S(0)};
}

// Which steps and channels a block and a thread work on.
struct ThreadPosition {
  Int T, C, segment, n_segments;
  int lane, span, thread;
  Int b, c, first_c, number;  // batch row, channel, the block's first channel, segment
  Int begin, end;             // the segment's steps
  bool inside, aligned;       // the channel exists; packs may be read and written whole

  WKV_DEVICE ThreadPosition(Int T, Int C, Int segment, Int aligned)
      : T(T), C(C), segment(segment), n_segments((T + segment - 1) / segment),
        lane(threadIdx.x), span(threadIdx.y), thread(threadIdx.y * LANES + threadIdx.x),
        aligned(aligned) {
    const Int tiles = (C + LANES - 1) / LANES;
    b = blockIdx.x / tiles;
    first_c = blockIdx.x % tiles * LANES;
    c = first_c + lane;
    inside = c < C;
    number = blockIdx.y;
    begin = number * segment;
    end = begin + segment < T ? begin + segment : T;
  }
  WKV_DEVICE Int n_chunks() const { return (end - begin + CHUNK - 1) / CHUNK; }
  WKV_DEVICE int chunk_steps(Int t) const { return int(end - t < CHUNK ? end - t : CHUNK); }
  // Steps of this thread's span in the chunk at t; spans fill up in order.
  WKV_DEVICE int n_steps(Int t) const {
    const int n = chunk_steps(t) - span * STEPS;
    return n < 0 ? 0 : n < STEPS ? n : STEPS;
  }
  WKV_DEVICE Int segments_row() const { return b * (n_segments + 1) + number; }
  WKV_DEVICE S per_channel(const S* x) const { return inside ? x[c] : S(-1); }
};

// The part of a tile that one thread moves: on its way in registers while another is worked on.
struct PrefetchedTile {
  Pack pack[PACKS];

  // From the chunk at t of an array (B, T, C); what lies outside it reads as 0.
  WKV_DEVICE void fetch(const ThreadPosition& at, const IO* array, Int t) {
#pragma unroll
    for (int i = 0; i < PACKS; ++i) {
      const int q = at.thread + i * THREADS, row = q / PACKS_PER_ROW;
      const Int c = at.first_c + q % PACKS_PER_ROW * PACK;
      const IO* from = array + (at.b * at.T + t + row) * at.C + c;
      if (row < at.chunk_steps(t) && at.aligned && c < at.C) {
        pack[i] = *reinterpret_cast<const Pack*>(from);
      } else {
#pragma unroll
        for (int e = 0; e < PACK; ++e)
          pack[i].x[e] = row < at.chunk_steps(t) && c + e < at.C ? from[e] : IO{};
      }
    }
  }
  WKV_DEVICE void unload(const ThreadPosition& at, Tile& tile) const {
#pragma unroll
    for (int i = 0; i < PACKS; ++i)
      reinterpret_cast<Pack*>(&tile)[at.thread + i * THREADS] = pack[i];
  }
};

// The thread that writes a pack of a tile to memory is the one that next overwrites that pack.
WKV_DEVICE void store_tile(const ThreadPosition& at, const Tile& tile, IO* array, Int t) {
#pragma unroll
  for (int i = 0; i < PACKS; ++i) {
    const int q = at.thread + i * THREADS, row = q / PACKS_PER_ROW;
    const Int c = at.first_c + q % PACKS_PER_ROW * PACK;
    if (row >= at.chunk_steps(t)) continue;
    IO* to = array + (at.b * at.T + t + row) * at.C + c;
    const Pack& pack = reinterpret_cast<const Pack*>(&tile)[q];
    if (at.aligned && c < at.C) {
      *reinterpret_cast<Pack*>(to) = pack;
    } else {
#pragma unroll
      for (int e = 0; e < PACK; ++e)
        if (c + e < at.C) to[e] = pack.x[e];
    }
  }
}

// What this thread's n steps make of an empty state.
WKV_DEVICE State<S> reduce_span(const ThreadPosition& at, int n, S w, const Tile& k, const Tile& v) {
  State<S> s = empty();
#pragma unroll
  for (int i = 0; i < STEPS; ++i) {
    const int row = at.span * STEPS + i;
    if (i < n) wkv::advance<S>(s, w, wkv::load(k.x[row][at.lane]), wkv::load(v.x[row][at.lane]));
  }
  return s;
}

// The state before this thread's span: `s`, that before the chunk, and the full spans between.
WKV_DEVICE State<S> before_span(const ThreadPosition& at, State<S> s, S w, const SharedStates<SPANS>& sums) {
  for (int i = 0; i < at.span; ++i) s = wkv::join<S>(s, sums.state(i, at.lane), w, S(STEPS));
  return s;
}

// Into ends[b, 1 + number] what each segment makes of an empty state, and into borders, if given,
// (B, all chunks, 4, C), what the chunks of the segment before each chunk make of it.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_FORWARD)
wkv_reduce(Int T, Int C, Int segment, Int aligned, const S* w_, const IO* k, const IO* v, S* ends,
           S* borders) {
  __shared__ Tile tile_k, tile_v;
  __shared__ SharedStates<SPANS> sums;
  const ThreadPosition at(T, C, segment, aligned);
  const S w = at.per_channel(w_);
  const Int row = at.b * ((T + CHUNK - 1) / CHUNK) + at.begin / CHUNK;
  State<S> s = empty();  // of the chunks so far; only span 0 uses it
  PrefetchedTile next_k, next_v;
  next_k.fetch(at, k, at.begin);
  next_v.fetch(at, v, at.begin);
  for (Int i = 0; i < at.n_chunks(); ++i) {
    const Int t = at.begin + i * CHUNK;
    next_k.unload(at, tile_k);
    next_v.unload(at, tile_v);
    if (i + 1 < at.n_chunks()) {
      next_k.fetch(at, k, t + CHUNK);
      next_v.fetch(at, v, t + CHUNK);
    }
    __syncthreads();
    sums.put(at.span, at.lane, reduce_span(at, at.n_steps(t), w, tile_k, tile_v));
    __syncthreads();
    if (at.span == 0) {
      if (borders && at.inside) store_state(borders, row + i, C, at.c, s);
      for (int j = 0; j * STEPS < at.chunk_steps(t); ++j) {
        const int n = at.chunk_steps(t) - j * STEPS;
        s = wkv::join<S>(s, sums.state(j, at.lane), w, S(n < STEPS ? n : STEPS));
      }
    }
  }
  if (at.span == 0 && at.inside) store_state(ends, at.segments_row() + 1, C, at.c, s);
}

// Turns ends (B, n_segments + 1, 4, C) into the state before each segment and after the last. One
// thread a row and channel.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
wkv_combine(Int B, Int T, Int C, Int segment, const S* w, const S* state, S* ends) {
  const Int n = (T + segment - 1) / segment, i = blockIdx.x * Int(THREADS) + threadIdx.x;
  if (i >= B * C) return;
  const Int b = i / C, c = i % C, row = b * (n + 1);
  State<S> s = given_state(state, b, C, c);
  store_state(ends, row, C, c, s);
  for (Int j = 0; j < n; ++j) {
    const Int steps = j + 1 < n ? segment : T - j * segment;
    s = wkv::join<S>(s, load_state(ends, row + j + 1, C, c), w[c], S(steps));
    store_state(ends, row + j + 1, C, c, s);
  }
}

// y, and in last (B, 3, C) the state after the last step. ends as wkv_combine leaves it, or null
// when there is one segment.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_FORWARD)
wkv_forward(Int T, Int C, Int segment, Int aligned, const S* w_, const S* u_, const IO* k,
            const IO* v, const S* state, const S* ends, IO* y, S* last) {
  __shared__ Tile tile_k, tile_v;  // tile_v takes y in the place of v
  __shared__ SharedStates<SPANS> sums;
  __shared__ SharedStates<1> carry;  // the state before the chunk
  const ThreadPosition at(T, C, segment, aligned);
  const S w = at.per_channel(w_), u = at.per_channel(u_);
  if (at.span == 0) {
    State<S> s = empty();
    if (at.inside)
      s = ends ? load_state(ends, at.segments_row(), C, at.c) : given_state(state, at.b, C, at.c);
    carry.put(0, at.lane, s);
  }
  PrefetchedTile next_k, next_v;
  next_k.fetch(at, k, at.begin);
  next_v.fetch(at, v, at.begin);
  __syncthreads();
  for (Int t = at.begin; t < at.end; t += CHUNK) {
    next_k.unload(at, tile_k);
    next_v.unload(at, tile_v);
    if (t + CHUNK < at.end) {
      next_k.fetch(at, k, t + CHUNK);
      next_v.fetch(at, v, t + CHUNK);
    }
    State<S> s = carry.state(0, at.lane);
    __syncthreads();
    const int n = at.n_steps(t);
    sums.put(at.span, at.lane, reduce_span(at, n, w, tile_k, tile_v));
    __syncthreads();
    if (n > 0) {
      s = before_span(at, s, w, sums);
#pragma unroll
      for (int i = 0; i < STEPS; ++i) {
        if (i >= n) break;
        const int row = at.span * STEPS + i;
        IO& value = tile_v.x[row][at.lane];
        wkv::store(value, wkv::forward_step<S>(s, w, u, wkv::load(tile_k.x[row][at.lane]),
                                               wkv::load(value)));
      }
      if (at.span * STEPS + n == at.chunk_steps(t)) carry.put(0, at.lane, s);
    }
    __syncthreads();
    store_tile(at, tile_v, y, t);
  }
  if (at.span == 0 && at.inside && at.end == T) {
    const State<S> s = carry.state(0, at.lane);
    S* to = last + at.b * 3 * C + at.c;
    to[0] = s.num;
    to[C] = s.den;
    to[2 * C] = wkv::exponent<S>(s, w);
  }
}

// The gradient that enters behind the last step, from that of the state returned.
WKV_DEVICE Adjoint<S> entering(const State<S>& last, const S* g_last, Int b, Int C, Int c) {
  g_last += b * 3 * C + c;
  return wkv::enter<S>(last, g_last[0], g_last[C], g_last[2 * C]);
}

struct BackwardArrays {
  const S *w, *u;
  const IO *k, *v, *gy;
  const S *ends, *borders;
  S* adjoints;  // (B, n_segments + 1, 4, C): row 1 + i is that behind segment i; the 4th is unused
};

// Shared memory of the backward pass; the tiles of k and v take gk and gv in their place.
struct BackwardShared {
  Tile k, v, gy;
  SharedStates<SPANS> sums, own;
  SharedStates<1> carry;  // the adjoint behind the chunk
};

// Walks a segment backwards from the adjoint g behind it. apply = false: only finds what the segment
// adds to an adjoint of zero; gk, gv, gw and gu are then left alone. Returns, for every thread of
// span 0, the adjoint before the segment.
template <bool apply>
WKV_DEVICE Adjoint<S> walk_back(const ThreadPosition& at, const BackwardArrays& a, BackwardShared& shared,
                                Adjoint<S> g, IO* gk, IO* gv, S& gw, S& gu) {
  const S w = at.per_channel(a.w), u = at.per_channel(a.u);
  const Int row = at.b * ((at.T + CHUNK - 1) / CHUNK) + at.begin / CHUNK;
  const State<S> first = at.inside ? load_state(a.ends, at.segments_row(), at.C, at.c) : empty();
  if (at.span == 0) shared.carry.put(0, at.lane, g.num, g.den, g.p, S(0));
  PrefetchedTile next_k, next_v, next_gy;
  const Int last_t = at.begin + (at.n_chunks() - 1) * CHUNK;
  next_k.fetch(at, a.k, last_t);
  next_v.fetch(at, a.v, last_t);
  next_gy.fetch(at, a.gy, last_t);
  __syncthreads();
  for (Int i = at.n_chunks() - 1; i >= 0; --i) {
    const Int t = at.begin + i * CHUNK;
    next_k.unload(at, shared.k);
    next_v.unload(at, shared.v);
    next_gy.unload(at, shared.gy);
    if (i > 0) {
      next_k.fetch(at, a.k, t - CHUNK);
      next_v.fetch(at, a.v, t - CHUNK);
      next_gy.fetch(at, a.gy, t - CHUNK);
    }
    const State<S> behind = shared.carry.state(0, at.lane);
    State<S> s = first;
    if (i > 0 && at.inside)
      s = wkv::join<S>(first, load_state(a.borders, row + i, at.C, at.c), w, S(i * CHUNK));
    __syncthreads();
    const int n = at.n_steps(t);
    shared.sums.put(at.span, at.lane, reduce_span(at, n, w, shared.k, shared.v));
    __syncthreads();

    s = before_span(at, s, w, shared.sums);  // of an empty span never used
    IO *k = &shared.k.x[at.span * STEPS][at.lane], *v = &shared.v.x[at.span * STEPS][at.lane];
    const IO* gy = &shared.gy.x[at.span * STEPS][at.lane];
    const auto step_back = [&](int j, const State<S>& s, Adjoint<S>& g) {
      return wkv::backward_step<S>(s, g, w, u, wkv::load(k[j * LANES]), wkv::load(v[j * LANES]),
                                   wkv::load(gy[j * LANES]));
    };
    State<S> before[STEPS];
#pragma unroll
    for (int j = 0; j < STEPS; ++j) {
      before[j] = s;
      if (j < n) wkv::advance<S>(s, w, wkv::load(k[j * LANES]), wkv::load(v[j * LANES]));
    }
    Adjoint<S> own{S(0), S(0), S(0)};
#pragma unroll
    for (int j = STEPS - 1; j >= 0; --j)
      if (j < n) step_back(j, before[j], own);
    const Passage<S> x = wkv::passage<S>(before[0], s, w, S(n));
    shared.own.put(at.span, at.lane, own.num, own.den, x.scale, x.keep);
    __syncthreads();

    if (n > 0) {
      g = {behind.num, behind.den, behind.top};
      const int n_spans = (at.chunk_steps(t) + STEPS - 1) / STEPS;
      for (int j = n_spans - 1; j > at.span; --j) {
        const State<S> later = shared.own.state(j, at.lane);
        g = wkv::join<S>({later.num, later.den, S(0)}, {later.top, later.age}, g);
      }
      if (apply) {
        S part_w = S(0), part_u = S(0);  // sums of few first: fewer roundings over a long T
#pragma unroll
        for (int j = STEPS - 1; j >= 0; --j) {
          if (j >= n) continue;
          const wkv::StepGradients<S> step = step_back(j, before[j], g);
          wkv::store(k[j * LANES], step.k);
          wkv::store(v[j * LANES], step.v);
          part_w += step.w;
          part_u += step.u;
        }
        gw += part_w;
        gu += part_u;
      } else {
        g = wkv::join<S>(own, x, g);
      }
      if (at.span == 0) shared.carry.put(0, at.lane, g.num, g.den, g.p, S(0));
    }
    __syncthreads();
    if (apply) {
      store_tile(at, shared.k, gk, t);
      store_tile(at, shared.v, gv, t);
    }
  }
  return g;
}

// Into adjoints[b, number] what a segment adds to an adjoint of zero behind it.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_BACKWARD)
wkv_backward_reduce(Int T, Int C, Int segment, Int aligned, const S* w, const S* u, const IO* k,
                    const IO* v, const IO* gy, const S* ends, const S* borders, S* adjoints) {
  __shared__ BackwardShared shared;
  const ThreadPosition at(T, C, segment, aligned);
  const BackwardArrays a{w, u, k, v, gy, ends, borders, adjoints};
  S gw = S(0), gu = S(0);
  const Adjoint<S> g = walk_back<false>(at, a, shared, {S(0), S(0), S(0)}, nullptr, nullptr, gw, gu);
  if (at.span == 0 && at.inside)
    store_state(adjoints, at.segments_row(), C, at.c, {g.num, g.den, g.p, S(0)});
}

// Turns adjoints (B, n_segments + 1, 4, C), row i what segment i adds, into row i + 1 the adjoint
// behind segment i. One thread a row and channel.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
wkv_backward_combine(Int B, Int T, Int C, Int segment, const S* w, const S* ends, const S* g_last,
                     S* adjoints) {
  const Int n = (T + segment - 1) / segment, i = blockIdx.x * Int(THREADS) + threadIdx.x;
  if (i >= B * C) return;
  const Int b = i / C, c = i % C, row = b * (n + 1);
  State<S> after = load_state(ends, row + n, C, c);
  Adjoint<S> g = entering(after, g_last, b, C, c);
  for (Int j = n - 1; j >= 0; --j) {
    const State<S> own = load_state(adjoints, row + j, C, c);
    const State<S> before = load_state(ends, row + j, C, c);
    store_state(adjoints, row + j + 1, C, c, {g.num, g.den, g.p, S(0)});
    const Int steps = j + 1 < n ? segment : T - j * segment;
    g = wkv::join<S>({own.num, own.den, S(0)}, wkv::passage<S>(before, after, w[c], S(steps)), g);
    after = before;
  }
}

// gk, gv (B, T, C); gw, gu (B, n_segments, C), sums over each segment; g_first (B, 3, C). adjoints
// as wkv_backward_combine leaves them, or null when there is one segment.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_BACKWARD)
wkv_backward(Int T, Int C, Int segment, Int aligned, const S* w, const S* u, const IO* k,
             const IO* v, const IO* gy, const S* ends, const S* borders, const S* g_last,
             S* adjoints, S* gw, S* gu, IO* gk, IO* gv, S* g_first) {
  __shared__ BackwardShared shared;
  const ThreadPosition at(T, C, segment, aligned);
  const BackwardArrays a{w, u, k, v, gy, ends, borders, adjoints};
  Adjoint<S> g{S(0), S(0), S(0)};
  S of_w = S(0), of_u = S(0);
  if (at.span == 0 && at.inside) {
    if (at.end == T) {
      const State<S> last = load_state(ends, at.segments_row() + 1, C, at.c);
      g = entering(last, g_last, at.b, C, at.c);
      of_w = g.p * last.age;
    } else {
      const State<S> behind = load_state(adjoints, at.segments_row() + 1, C, at.c);
      g = {behind.num, behind.den, behind.top};
    }
  }
  g = walk_back<true>(at, a, shared, g, gk, gv, of_w, of_u);
  shared.sums.put(at.span, at.lane, of_w, of_u, S(0), S(0));
  __syncthreads();
  if (at.span != 0 || !at.inside) return;
  of_w = of_u = S(0);
  for (int j = 0; j < SPANS; ++j) {
    of_w += shared.sums.x[0][j][at.lane];
    of_u += shared.sums.x[1][j][at.lane];
  }
  const Int to = (at.b * at.n_segments + at.number) * C + at.c;
  gw[to] = of_w;
  gu[to] = of_u;
  if (at.begin == 0) {
    const State<S> first = load_state(ends, at.segments_row(), C, at.c);
    S* out = g_first + at.b * 3 * C + at.c;
    out[0] = g.num;
    out[C] = g.den;
    out[2 * C] = wkv::leave<S>(first, g);
  }
}

// One token through RWKV-4's time-mix, but for the output projection, in one launch: token shift,
// the three projections, WKV, gate. A warp makes one output channel of ROWS batch rows: its lanes
// read the three rows of weights once, 16 bytes at a time: 3 C^2 elements, which is nearly all there
// is to read (7 MB at C = 768 in float32, 2 us of an H100's memory: an estimate).
constexpr int WARPS = 8, ROWS = 4;

WKV_DEVICE S sigmoid(S x) {
  const S e = wkv::exp_nonpositive(-wkv::magnitude(x));
  return (x < S(0) ? e : S(1)) / (S(1) + e);
}

WKV_DEVICE Pack load_pack(const IO* from, Int c, Int C, Int aligned) {
  if (aligned) return *reinterpret_cast<const Pack*>(from + c);
  Pack pack;
#pragma unroll
  for (int e = 0; e < PACK; ++e) pack.x[e] = c + e < C ? from[c + e] : IO{};
  return pack;
}

// x, previous, out (B, C); mix_* (C); weight_* (C, C), out by in; state, next (B, 3, C).
extern "C" __global__ void __launch_bounds__(32 * WARPS, 2)
wkv_time_mix_step(Int B, Int C, Int aligned, const IO* x, const IO* previous, const IO* mix_k,
                  const IO* mix_v, const IO* mix_r, const IO* weight_k, const IO* weight_v,
                  const IO* weight_r, const S* w, const S* u, const S* state, IO* out, S* next) {
  const Int c = blockIdx.x * Int(WARPS) + threadIdx.y, first_b = blockIdx.y * Int(ROWS);
  if (c >= C) return;
  const IO* mixes[3] = {mix_k, mix_v, mix_r};
  const IO* weights[3] = {weight_k + c * C, weight_v + c * C, weight_r + c * C};
  S sums[3][ROWS] = {};
  for (Int i = Int(threadIdx.x) * PACK; i < C; i += 32 * PACK) {
    Pack mix[3], weight[3];
#pragma unroll
    for (int p = 0; p < 3; ++p) {
      mix[p] = load_pack(mixes[p], i, C, aligned);
      weight[p] = load_pack(weights[p], i, C, aligned);
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      if (first_b + r >= B) break;
      const Pack here = load_pack(x + (first_b + r) * C, i, C, aligned);
      const Pack there = load_pack(previous + (first_b + r) * C, i, C, aligned);
#pragma unroll
      for (int e = 0; e < PACK; ++e) {
        const S before = wkv::load(there.x[e]), step = wkv::load(here.x[e]) - before;
#pragma unroll
        for (int p = 0; p < 3; ++p)
          sums[p][r] += wkv::load(weight[p].x[e]) * (before + wkv::load(mix[p].x[e]) * step);
      }
    }
  }
#pragma unroll
  for (int p = 0; p < 3; ++p)
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int far = 16; far > 0; far /= 2)
        sums[p][r] += __shfl_xor_sync(0xffffffffu, sums[p][r], far);
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const Int b = first_b + r;
    if (int(threadIdx.x) != r || b >= B) continue;
    State<S> s = given_state(state, b, C, c);
    const S y = wkv::forward_step<S>(s, w[c], u[c], sums[0][r], sums[1][r]);
    wkv::store(out[b * C + c], sigmoid(sums[2][r]) * y);
    S* to = next + b * 3 * C + c;
    to[0] = s.num;
    to[C] = s.den;
    to[2 * C] = wkv::exponent<S>(s, w[c]);
  }
}

// y = W x for a few rows x, as decoding one token has: a pass over W at the speed of memory.
//
// W may be float32, float16 or bfloat16; x, y and the sums are float32. A library's product for many
// rows, called with one, reads W at a fifth to a half of what memory gives.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#include "parallel.h"
#include "wkv_scalar.h"

namespace rows {

constexpr int64_t LANES = 16;            // floats of a vector: 64 bytes, a line of the cache
constexpr int64_t LINE = 64;             // bytes
constexpr int64_t ERRAND = 1 << 18;      // bytes of W that are worth waking a thread
constexpr int64_t STRETCH = 1 << 18;     // bytes of W that a thread takes at a time
constexpr int64_t AHEAD = 1 << 11;       // bytes of W that are asked for in advance
typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef unsigned Bits __attribute__((vector_size(LANES * 4)));
typedef unsigned short Halves __attribute__((vector_size(LANES * 2)));

WKV_FN Floats widen(const float* p) {
  Floats x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
WKV_FN Floats widen(const wkv::BFloat16* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  const Bits bits = __builtin_convertvector(h, Bits) << 16;
  Floats x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
WKV_FN Floats widen(const wkv::Half* p) {
  Floats x;
  for (int64_t i = 0; i < LANES; ++i) x[i] = wkv::load(p[i]);
  return x;
}

// 2 * LANES of W and of x, in an order that suits W: for bfloat16 the even ones and the odd ones, as
// a shift and a mask tell them apart.
struct Two {
  Floats first, second;
};

template <typename W>
WKV_FN Two two(const W* p) {
  return {widen(p), widen(p + LANES)};
}
WKV_FN Two two(const wkv::BFloat16* p) {
  Bits bits;
  std::memcpy(&bits, p, sizeof bits);
  const Bits even = bits << 16, odd = bits & 0xffff0000u;
  Two out;
  std::memcpy(&out.first, &even, sizeof even);
  std::memcpy(&out.second, &odd, sizeof odd);
  return out;
}

template <typename W>
WKV_FN Two inputs_for(const float* x) {
  const Floats a = widen(x), b = widen(x + LANES);
  if (!std::is_same<W, wkv::BFloat16>::value) return {a, b};
#ifdef __clang__
  return {__builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
          __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)};
#else
  const Bits even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  return {__builtin_shuffle(a, b, even), __builtin_shuffle(a, b, even + 1)};
#endif
}

WKV_FN float total(const Floats& x) {
  float part[LANES];
  std::memcpy(part, &x, sizeof part);
  for (int64_t n = LANES / 2; n > 0; n /= 2)
    for (int64_t i = 0; i < n; ++i) part[i] += part[i + n];
  return part[0];
}

template <typename W>
struct Product {
  int64_t n_in, n_out;
  const float* x;     // (rows, n_in)
  const W* w;         // (n_out, n_in)
  const float* bias;  // (n_out), or null
  float* y;           // (rows, n_out)

  // OUT outputs, from `first` on and `apart` from each other, of ROWS rows from `row` on.
  template <int OUT, int ROWS>
  void block(int64_t row, int64_t first, int64_t apart) const {
    Floats sums[OUT][ROWS] = {};
    const float* from = x + row * n_in;
    const W* weights = w + first * n_in;
    int64_t i = 0;
    for (; i + 2 * LANES <= n_in; i += 2 * LANES) {
      Two parts[OUT];
      for (int o = 0; o < OUT; ++o) {
        const W* next = weights + o * apart * n_in + i;
        parts[o] = two(next);
        for (int64_t line = 0; line < 2 * LANES * int64_t(sizeof(W)); line += LINE)
          __builtin_prefetch(next + (AHEAD + line) / int64_t(sizeof(W)), 0, 2);
      }
      for (int r = 0; r < ROWS; ++r) {
        const Two input = inputs_for<W>(from + r * n_in + i);
        for (int o = 0; o < OUT; ++o)
          sums[o][r] += parts[o].first * input.first + parts[o].second * input.second;
      }
    }
    for (; i + LANES <= n_in; i += LANES)
      for (int o = 0; o < OUT; ++o)
        for (int r = 0; r < ROWS; ++r)
          sums[o][r] += widen(weights + o * apart * n_in + i) * widen(from + r * n_in + i);
    for (int o = 0; o < OUT; ++o)
      for (int r = 0; r < ROWS; ++r) {
        const int64_t output = first + o * apart;
        float sum = total(sums[o][r]) + (bias ? bias[output] : 0.0f);
        for (int64_t j = i; j < n_in; ++j)
          sum += wkv::load(w[output * n_in + j]) * from[r * n_in + j];
        y[(row + r) * n_out + output] = sum;
      }
  }

  // In OUT streams: memory is fastest where each goes on for long.
  template <int ROWS, int OUT>
  void outputs(int64_t row, int64_t begin, int64_t end) const {
    const int64_t each = (end - begin) / OUT;
    for (int64_t i = 0; i < each; ++i) block<OUT, ROWS>(row, begin + i, each);
    for (int64_t o = begin + OUT * each; o < end; ++o) block<1, ROWS>(row, o, 0);
  }

  // Outputs begin .. end - 1 of all n rows.
  void run(int64_t n, int64_t begin, int64_t end) const {
    for (int64_t row = 0; row < n;) {
      switch (n - row) {
        case 1: outputs<1, 8>(row, begin, end); return;
        case 2: outputs<2, 4>(row, begin, end); return;
        case 3: outputs<3, 4>(row, begin, end); return;
        default: outputs<4, 4>(row, begin, end); row += 4;
      }
    }
  }
};

// How many threads are worth it for so many bytes of W and rows.
inline parallel::Threads worthwhile(parallel::Threads threads, int64_t bytes, int64_t n_rows) {
  return {std::min(threads.most, std::max<int64_t>(1, bytes * n_rows / ERRAND)), threads.fork};
}

// Products of n_rows rows each, side by side, as one phase.
template <typename W>
void multiply(int64_t n_rows, std::initializer_list<Product<W>> products,
              parallel::Member& member) {
  // stretches of a size, as many for each thread, so that none waits for long
  const int64_t n_threads = member.n_threads();
  const auto outputs = [&](const Product<W>& p) {
    const int64_t each = p.n_in * p.n_out * int64_t(sizeof(W)) / n_threads;
    const int64_t parts = n_threads * (each / STRETCH + 1);
    return std::max<int64_t>(8, ((p.n_out + parts - 1) / parts + 7) / 8 * 8);
  };
  const auto stretches = [&](const Product<W>& p) {
    return (p.n_out + outputs(p) - 1) / outputs(p);
  };
  int64_t n = 0;
  for (const auto& p : products) n += stretches(p);
  member.share(n, [&](int64_t i) {
    for (const auto& p : products) {
      if (i < stretches(p)) {
        p.run(n_rows, i * outputs(p), std::min(p.n_out, (i + 1) * outputs(p)));
        return;
      }
      i -= stretches(p);
    }
  });
}

}  // namespace rows

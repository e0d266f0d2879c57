// y = W x for a few rows x, as decoding one token has: a pass over W at the speed of memory.
//
// W may be float32, float16 or bfloat16; x, y and the sums are float32. A library's product for many
// rows, called with one, reads W at a fifth to a half of what memory gives.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "parallel.h"
#include "wkv_scalar.h"

namespace rows {

constexpr int64_t LANES = 16;            // floats of a vector: 64 bytes, a line of the cache
constexpr int64_t ERRAND = 1 << 18;      // bytes of W that are worth waking a thread
constexpr int64_t STRETCH = 1 << 15;     // bytes of W that a thread takes at a time
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

  // Outputs first .. first + OUT - 1 of ROWS rows from `row` on.
  template <int OUT, int ROWS>
  void block(int64_t row, int64_t first) const {
    Floats sums[OUT][ROWS] = {};
    const float* from = x + row * n_in;
    const W* weights = w + first * n_in;
    int64_t i = 0;
    for (; i + LANES <= n_in; i += LANES) {
      Floats parts[OUT];
      for (int o = 0; o < OUT; ++o) {
        parts[o] = widen(weights + o * n_in + i);
        __builtin_prefetch(weights + (o + OUT) * n_in + i, 0, 2);
      }
      for (int r = 0; r < ROWS; ++r) {
        const Floats input = widen(from + r * n_in + i);
        for (int o = 0; o < OUT; ++o) sums[o][r] += parts[o] * input;
      }
    }
    for (int o = 0; o < OUT; ++o)
      for (int r = 0; r < ROWS; ++r) {
        float sum = total(sums[o][r]) + (bias ? bias[first + o] : 0.0f);
        for (int64_t j = i; j < n_in; ++j)
          sum += wkv::load(weights[o * n_in + j]) * from[r * n_in + j];
        y[(row + r) * n_out + first + o] = sum;
      }
  }

  template <int ROWS, int OUT>
  void outputs(int64_t row, int64_t begin, int64_t end) const {
    for (; begin + OUT <= end; begin += OUT) block<OUT, ROWS>(row, begin);
    for (; begin < end; ++begin) block<1, ROWS>(row, begin);
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
  // stretches of a size, and many, so that no thread waits for long
  const auto outputs = [](const Product<W>& p) {
    const int64_t line = std::max<int64_t>(1, p.n_in * int64_t(sizeof(W)));
    return std::max<int64_t>(8, STRETCH / line / 8 * 8);
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

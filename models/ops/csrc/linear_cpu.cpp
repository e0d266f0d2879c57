// y = W x for a few rows x, as decoding one token has: a pass over W at the speed of memory.
//
// W may be float32, float16 or bfloat16; x, y and the sums are float32. A library's product for many
// rows, called with one, reads W at a fifth to a half of what memory gives.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "parallel.h"
#include "wkv_scalar.h"

namespace {

using wkv::BFloat16;
using wkv::Half;

constexpr int64_t LANES = 16;            // floats of a vector: 64 bytes, a line of the cache
constexpr int64_t ERRAND = 1 << 18;      // bytes of W that are worth waking a thread
constexpr int64_t STRETCH = 1 << 17;     // bytes of W that a thread takes at a time
typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef unsigned Bits __attribute__((vector_size(LANES * 4)));
typedef unsigned short Halves __attribute__((vector_size(LANES * 2)));

WKV_FN Floats widen(const float* p) {
  Floats x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
WKV_FN Floats widen(const BFloat16* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  const Bits bits = __builtin_convertvector(h, Bits) << 16;
  Floats x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
WKV_FN Floats widen(const Half* p) {
  Floats x;
  for (int64_t i = 0; i < LANES; ++i) x[i] = wkv::load(p[i]);
  return x;
}

template <typename W>
struct Linear {
  int64_t n_in, n_out;
  const float* x;  // (rows, n_in)
  const W* w;      // (n_out, n_in)
  const float* bias;  // (n_out), or null
  float* y;        // (rows, n_out)

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
        float sum = bias ? bias[first + o] : 0.0f;
        for (int64_t lane = 0; lane < LANES; ++lane) sum += sums[o][r][lane];
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

  void rows(int64_t n, int64_t begin, int64_t end) const {
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

template <typename W>
void linear(int64_t n_rows, int64_t n_in, int64_t n_out, const float* x, const void* w,
            const float* bias, float* y, int64_t n_threads, parallel::Fork fork) {
  const Linear<W> call{n_in, n_out, x, static_cast<const W*>(w), bias, y};
  const int64_t line = std::max<int64_t>(1, n_in * int64_t(sizeof(W)));  // bytes of an output's weights
  const int64_t worthwhile = std::max<int64_t>(1, n_out * line * n_rows / ERRAND);
  n_threads = std::min(n_threads, worthwhile);
  // each thread its own stretches, all of a size, so that none waits for long
  const int64_t wanted = std::max(n_threads, n_out * line / STRETCH);
  const int64_t size = std::max<int64_t>(4, (n_out + wanted - 1) / wanted / 4 * 4);
  parallel::in_parallel((n_out + size - 1) / size, n_threads, fork, [&](int64_t i) {
    call.rows(n_rows, i * size, std::min(n_out, (i + 1) * size));
  });
}

}  // namespace

// 0, or 1 for a type of W it does not know; `bias` may be null.
extern "C" int linear_rows(int dtype, int64_t n_rows, int64_t n_in, int64_t n_out, const float* x,
                           const void* w, const float* bias, float* y, int64_t n_threads,
                           void* fork) {
  const auto run = [&](auto like) {
    linear<decltype(like)>(n_rows, n_in, n_out, x, w, bias, y, n_threads,
                           reinterpret_cast<parallel::Fork>(fork));
    return 0;
  };
  switch (dtype) {  // the order of _DTYPES in cpu.py
    case 0: return run(float{});
    case 1: return run(Half{});
    case 2: return run(BFloat16{});
  }
  return 1;
}

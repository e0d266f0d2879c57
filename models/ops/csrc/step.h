// What every family's step shares: one token through all layers of a model on a CPU, behind a C
// interface for ctypes.
//
// A step reads every weight once and does little else, so what it must not do is wait: threads are
// woken once, and then go through the phases of all layers together. What comes in is only read.
// Arrays are contiguous and float32, but for matrices, which share a type; a layer's arrays come as
// a run of pointers, in the order of its struct.
#pragma once
#include <cmath>
#include <memory>
#include <new>

#include "rows.h"

namespace step {

using parallel::Member;
using parallel::Threads;
using rows::multiply;

constexpr float EPSILON = 1e-5f;  // nn.LayerNorm's

WKV_FN float total(const float* x, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i];
  return sum;
}

inline void layer_norm(int64_t n, const float* x, const float* weight, const float* bias, float* y) {
  const float mean = total(x, n) / float(n);
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < n; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const float scale = 1.0f / std::sqrt(squares / float(n) + EPSILON);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = (x[i] - mean) * scale * weight[i] + bias[i];
}

WKV_FN float sigmoid(float x) {
  const float e = wkv::exp_nonpositive(-std::fabs(x));
  return (x < 0 ? e : 1.0f) / (1.0f + e);
}

// Calls layer(arrays, l, member) for each of L layers, whose arrays are n bytes of pointers.
template <typename Layer, typename Call>
void through(int64_t L, int64_t n_phases, const void* const* pointers, Threads threads,
             const Call& call) {
  parallel::in_phases(L * n_phases, threads, [&](Member& member) {
    for (int64_t l = 0; l < L; ++l) {
      Layer arrays;
      std::memcpy(&arrays, pointers + l * (sizeof arrays / sizeof(void*)), sizeof arrays);
      call(l, arrays, member);
    }
  });
}

// Returns 0, 1 for a type of matrices it does not know, or 2 when memory ran out.
template <typename Run>
int for_dtype(int dtype, const Run& run) {
  try {
    switch (dtype) {  // the order of _DTYPES in models/ops/cpu.py
      case 0: return run(float{}), 0;
      case 1: return run(wkv::Half{}), 0;
      case 2: return run(wkv::BFloat16{}), 0;
    }
  } catch (const std::bad_alloc&) {
    return 2;
  }
  return 1;
}

}  // namespace step

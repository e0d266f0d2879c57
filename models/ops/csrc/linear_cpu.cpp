// y = W x + b for a few rows x, behind a C interface for ctypes; all arrays are contiguous.
#include "rows.h"

// 0, or 1 for a type of W it does not know; `bias` may be null.
extern "C" int linear_rows(int dtype, int64_t n_rows, int64_t n_in, int64_t n_out, const float* x,
                           const void* w, const float* bias, float* y, int64_t n_threads,
                           void* fork) {
  const auto run = [&](auto like) {
    using W = decltype(like);
    const rows::Product<W> product{n_in, n_out, x, static_cast<const W*>(w), bias, y};
    const parallel::Threads threads = rows::worthwhile(
        {n_threads, reinterpret_cast<parallel::Fork>(fork)}, n_in * n_out * sizeof(W), n_rows);
    parallel::in_phases(1, threads, [&](parallel::Member& member) {
      rows::multiply(n_rows, {product}, member);
    });
    return 0;
  };
  switch (dtype) {  // the order of _DTYPES in cpu.py
    case 0: return run(float{});
    case 1: return run(wkv::Half{});
    case 2: return run(wkv::BFloat16{});
  }
  return 1;
}

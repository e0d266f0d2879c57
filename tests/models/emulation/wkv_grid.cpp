// All kernels of wkv_cuda.cu behind one C function; WKV_IO is the element type, as for NVRTC.
#include "grid.h"

#include "wkv_cuda.cu"

struct Kernel {
  const char* name;
  void (*call)(void*);
  size_t n_arguments;
};

#define KERNEL(name) {#name, grid::call<name>, grid::arity(name)}
static const Kernel KERNELS[] = {
    KERNEL(wkv_reduce),          KERNEL(wkv_combine),          KERNEL(wkv_forward),
    KERNEL(wkv_backward_reduce), KERNEL(wkv_backward_combine), KERNEL(wkv_backward),
    KERNEL(wkv_time_mix_step),
};

// 0, or 1 for an unknown kernel or a wrong number of arguments.
extern "C" int launch(const char* name, unsigned grid_x, unsigned grid_y, unsigned block_x,
                      unsigned block_y, long long* arguments, size_t n_arguments, unsigned seed) {
  for (const Kernel& kernel : KERNELS) {
    if (std::strcmp(kernel.name, name) != 0 || kernel.n_arguments != n_arguments) continue;
    grid::run(kernel.call, arguments, {grid_x, grid_y, 1}, {block_x, block_y, 1}, seed);
    return 0;
  }
  return 1;
}

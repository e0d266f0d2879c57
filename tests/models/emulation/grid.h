// A GPU's grid on one CPU thread, enough to run wkv_cuda.cu unchanged.
//
// The threads of a block are fibers, switched at barriers and warp shuffles only. Between two
// barriers they run in an order that `order_seed` shuffles, so that a missing barrier changes a
// result; a barrier that not all threads reach is an error. Shared memory is filled with NaN before
// each block.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// one section holds all shared memory, so that it can be poisoned whole
#define __shared__ static __attribute__((section("shared_memory")))

extern "C" char __start_shared_memory[], __stop_shared_memory[];

namespace grid {

struct Index {
  unsigned x, y, z;
};

enum class Waiting { no, for_warp, for_block, done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Waiting waiting = Waiting::no;
  double lent = 0;  // what it offers in a shuffle
};

constexpr size_t STACK = 256 * 1024;
constexpr unsigned WARP = 32;

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline unsigned current;
inline Index block_index, block_size;
inline void (*body)(void*);
inline void* body_arguments;

inline void wait(Waiting what) {
  fibers[current].waiting = what;
  swapcontext(&fibers[current].context, &scheduler);
}

inline void enter() {
  body(body_arguments);
  fibers[current].waiting = Waiting::done;
}

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "grid: %s\n", what);
  std::abort();
}

// Lets threads [first, last) go on if all that are not done wait for the same thing.
inline bool release(unsigned first, unsigned last, Waiting what) {
  bool any = false;
  for (unsigned i = first; i < last; ++i) {
    if (fibers[i].waiting == Waiting::done) continue;
    if (fibers[i].waiting != what) return false;
    any = true;
  }
  for (unsigned i = first; i < last; ++i)
    if (fibers[i].waiting == what) fibers[i].waiting = Waiting::no;
  return any;
}

inline void run_block(std::mt19937& random) {
  std::memset(__start_shared_memory, 0xff, size_t(__stop_shared_memory - __start_shared_memory));
  const unsigned n = block_size.x * block_size.y;
  fibers.resize(std::max<size_t>(fibers.size(), n));
  for (unsigned i = 0; i < n; ++i) {
    Fiber& fiber = fibers[i];
    if (!fiber.stack) fiber.stack.reset(new char[STACK]);
    fiber.waiting = Waiting::no;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
  }
  std::vector<unsigned> order(n);
  std::iota(order.begin(), order.end(), 0u);
  for (;;) {
    std::shuffle(order.begin(), order.end(), random);
    for (unsigned i : order) {
      if (fibers[i].waiting != Waiting::no) continue;
      current = i;
      swapcontext(&scheduler, &fibers[i].context);
    }
    bool released = false, left = false;
    for (unsigned i = 0; i < n; i += WARP)
      released |= release(i, std::min(i + WARP, n), Waiting::for_warp);
    if (!released) released = release(0, n, Waiting::for_block);
    for (unsigned i = 0; i < n; ++i) left |= fibers[i].waiting != Waiting::done;
    if (!left) return;
    if (!released) fail("threads wait for different barriers");
  }
}

inline void run(void (*kernel)(void*), void* arguments, Index size, Index block, unsigned seed) {
  std::mt19937 random(seed);
  body = kernel;
  body_arguments = arguments;
  block_size = block;
  for (block_index.y = 0; block_index.y < size.y; ++block_index.y)
    for (block_index.x = 0; block_index.x < size.x; ++block_index.x) run_block(random);
}

template <typename A>
A argument(const long long* from) {
  static_assert(sizeof(A) == 8, "64-bit parameters only");
  A a;
  std::memcpy(&a, from, sizeof a);
  return a;
}

// Unpacks 64-bit arguments, pointers and integers alike, into a kernel's parameters.
template <typename... A, size_t... I>
void unpack(void (*kernel)(A...), const long long* arguments, std::index_sequence<I...>) {
  kernel(argument<A>(arguments + I)...);
}

template <typename... A>
constexpr size_t arity(void (*)(A...)) {
  return sizeof...(A);
}

template <auto kernel>
void call(void* arguments) {
  unpack(kernel, static_cast<const long long*>(arguments),
         std::make_index_sequence<arity(kernel)>());
}

}  // namespace grid

#define threadIdx (grid::Index{grid::current % grid::block_size.x, grid::current / grid::block_size.x, 0})
#define blockIdx grid::block_index

inline void __syncthreads() { grid::wait(grid::Waiting::for_block); }

template <typename X>
X __shfl_xor_sync(unsigned, X value, int mask) {
  grid::fibers[grid::current].lent = double(value);
  grid::wait(grid::Waiting::for_warp);
  const X other = X(grid::fibers[grid::current ^ unsigned(mask)].lent);
  grid::wait(grid::Waiting::for_warp);  // nobody lends anew before all have read
  return other;
}

// Work shared among the threads of a CPU.
#pragma once

#include <atomic>
#include <cstdint>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace parallel {

// GOMP_parallel of the OpenMP runtime that PyTorch runs on, so that both share one pool of threads.
using Fork = void (*)(void (*)(void*), void*, unsigned, unsigned);

template <typename Call>
struct Job {
  const Call& call;
  int64_t n;
  std::atomic<int64_t> next{0};
  std::atomic<bool> out_of_memory{false};

  static void work(void* self) {
    Job& job = *static_cast<Job*>(self);
    try {
      for (int64_t i; (i = job.next++) < job.n;) job.call(i);
    } catch (const std::bad_alloc&) {
      job.out_of_memory = true;
    }
  }
};

// Calls call(i) for i in 0 .. n - 1; false when memory ran out.
template <typename Call>
bool in_parallel(int64_t n, int64_t n_threads, Fork fork, const Call& call) {
  Job<Call> job{call, n};
  if (n_threads > n) n_threads = n;
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
  return !job.out_of_memory;
}

}  // namespace parallel

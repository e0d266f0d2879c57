// Work shared among the threads of a CPU: at one go, or in phases.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
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

struct Threads {
  int64_t most;
  Fork fork;
};

struct alignas(64) Count {
  std::atomic<int64_t> value{0};
};

// One thread of several that go through the same phases.
class Member {
 public:
  // `counts`: for each phase, one of each thread and one of all.
  Member(Count* counts, int64_t number, int64_t n_threads)
      : counts_(counts), number_(number), n_threads_(n_threads) {}

  int64_t n_threads() const { return n_threads_; }

  // call(0) .. call(n - 1), by whoever comes; returns when all are done. A thread goes through a
  // share of its own in order, and then helps the others. What waits is work, not threads: one that
  // the system holds up catches up later, and nobody stands still for it.
  template <typename Call>
  void share(int64_t n, const Call& call) {
    std::atomic<int64_t>& done = counts_[n_threads_].value;
    for (int64_t k = 0; k < n_threads_; ++k) {
      const int64_t owner = (number_ + k) % n_threads_;
      const int64_t begin = n * owner / n_threads_, end = n * (owner + 1) / n_threads_;
      for (int64_t i; (i = begin + counts_[owner].value++) < end; ++done) call(i);
    }
    for (int64_t spins = 0; done < n; ++spins)
      if (spins > PATIENCE) std::this_thread::yield();
    counts_ += n_threads_ + 1;
  }

 private:
  static constexpr int64_t PATIENCE = 2000;
  Count* counts_;
  int64_t number_, n_threads_;
};

// Calls work(member) on each thread; it shares n_phases times at most, on all of them the same.
template <typename Work>
void in_phases(int64_t n_phases, Threads threads, const Work& work) {
  const std::unique_ptr<Count[]> counts(new Count[n_phases * (threads.most + 1)]);
  in_parallel(threads.most, threads.most, threads.fork, [&](int64_t number) {
    Member member(counts.get(), number, threads.most);
    work(member);
  });
}

}  // namespace parallel

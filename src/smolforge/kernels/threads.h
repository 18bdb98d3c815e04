// The threads of native code, which are torch's own.

#pragma once

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

extern "C" {
// Of GCC's OpenMP, and of LLVM's and Intel's, which speak the same; null where nothing that is loaded has them.
void GOMP_parallel(void (*)(void*), void*, unsigned threads, unsigned flags) __attribute__((weak));
int omp_get_thread_num() __attribute__((weak));
int omp_get_num_threads() __attribute__((weak));
}

namespace {

// job(id, count) on so many threads, or on fewer, as OpenMP gives them; `count` says how many. They are those of torch's own
// OpenMP, whichever library that is: they may be spinning for their next work just now, and threads of our own would have
// to wait for their cores (twice the time of a decoding step, docs/log.md). Without one in the process each call starts its own.
template <class Job> void together(int threads, Job job) {
  if (threads > 1 && GOMP_parallel && omp_get_thread_num && omp_get_num_threads)
    return GOMP_parallel([](void* j) { (*(Job*)j)(omp_get_thread_num(), omp_get_num_threads()); }, &job, threads, 0);
  std::vector<std::thread> others;
  for (int i = 1; i < threads; i++) others.emplace_back([&job, i, threads] { job(i, threads); });
  job(0, std::max(threads, 1));
  for (auto& t : others) t.join();
}

// Work items in turns.
template <class Work> void in_turns(int items, int threads, Work work) {
  std::atomic<int> next{0};
  together(std::min(threads, items), [&](int, int) { for (int i; (i = next.fetch_add(1)) < items;) work(i); });
}

}  // namespace

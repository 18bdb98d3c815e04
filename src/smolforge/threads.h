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

// Work items in turns, on the threads of torch's own OpenMP, whichever library that is: they may be spinning for their
// next work just now, and threads of our own would have to wait for their cores.
template <class Work> void in_turns(int items, int threads, Work work) {
  std::atomic<int> next{0};
  auto take = [&] { for (int i; (i = next.fetch_add(1)) < items;) work(i); };
  using Take = decltype(take);
  threads = std::min(threads, items);
  if (threads > 1 && GOMP_parallel) return GOMP_parallel([](void* t) { (*(Take*)t)(); }, &take, threads, 0);
  std::vector<std::thread> others;
  for (int i = 1; i < threads; i++) others.emplace_back(take);
  take();
  for (auto& t : others) t.join();
}

}  // namespace

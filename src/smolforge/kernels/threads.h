// Threads: those of the OpenMP that torch has loaded, looked up when first used.
//
// torch's threads spin for a while after their work. Threads of our own would have to wait for their cores, which doubles
// the time of a decoding step (docs/log.md). The OpenMP is not linked, since its file has another name in every build of
// torch: GCC's (torch for Linux) and LLVM's (torch for macOS) both have the three functions below. Intel's for Windows
// does not; there, and in a process without OpenMP, every call starts its own threads and waits for them.

#pragma once

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>
#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#include <dlfcn.h>
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags) = nullptr;
  int (*thread)() = nullptr, (*threads)() = nullptr;
};

inline OpenMP find_openmp() {
  OpenMP found;
#if !defined(_WIN32)
  const auto find = [](auto& function, const char* name) { function = (std::decay_t<decltype(function)>)dlsym(RTLD_DEFAULT, name); };
  find(found.parallel, "GOMP_parallel"), find(found.thread, "omp_get_thread_num"), find(found.threads, "omp_get_num_threads");
#endif
  return found;
}

// job(id, count) on so many threads, or on fewer, as OpenMP gives them; `count` says how many.
template <class Job> void parallel(int threads, Job job) {
  static const OpenMP openmp = find_openmp();
  struct Call { Job& job; const OpenMP& openmp; } call{job, openmp};
  if (threads > 1 && openmp.parallel && openmp.thread && openmp.threads) {
    const auto run = [](void* p) { auto& c = *(Call*)p; c.job(c.openmp.thread(), c.openmp.threads()); };
    return openmp.parallel(run, &call, threads, 0);
  }
  std::vector<std::thread> others;
  for (int i = 1; i < threads; i++) others.emplace_back([&job, i, threads] { job(i, threads); });
  job(0, std::max(threads, 1));
  for (auto& t : others) t.join();
}

// work(item) for all items; a thread that is done takes the next one.
template <class Work> void parallel_for(int items, int threads, Work work) {
  std::atomic<int> next{0};
  parallel(std::min(threads, items), [&](int, int) { for (int i; (i = next.fetch_add(1)) < items;) work(i); });
}

// Threads that wait for each other between the parts of one job: they spin, then yield.
struct Team {
  explicit Team(int n) : most(n) {}
  // f(id) on every thread; there may be fewer than asked for, `size` says how many.
  template <class Job> void run(const Job& f) {
    parallel(most, [this, &f](int id, int count) {
      size.store(count, std::memory_order_relaxed);  // all store the same number
      f(id);
    });
  }
  void barrier() {
    if (size == 1) return;
    const unsigned mine = phase.load(std::memory_order_acquire);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
      arrived.store(0, std::memory_order_relaxed);
      phase.store(mine + 1, std::memory_order_release);
      return;
    }
    // On a busy core the thread that is waited for may need this very core: yield after a while.
    for (int spins = 0; phase.load(std::memory_order_acquire) == mine; spins++) {
      if (spins > 4000) std::this_thread::yield();
#if defined(__x86_64__)
      else __builtin_ia32_pause();
#endif
    }
  }
  const int most;
  std::atomic<int> size{1};

 private:
  std::atomic<int> arrived{0};
  std::atomic<unsigned> phase{0};
};

}  // namespace

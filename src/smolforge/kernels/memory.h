// Memory that starts at a cache line. C++17's aligned new is in every C++ library; aligned_alloc is not on Windows.

#pragma once

#include <cstddef>
#include <cstring>
#include <new>

namespace {

constexpr std::align_val_t LINE{64};
inline size_t whole_lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Uninitialised bytes.
struct Aligned {
  void* p;
  explicit Aligned(size_t bytes) : p(::operator new(whole_lines(bytes), LINE)) {}
  ~Aligned() { ::operator delete(p, LINE); }
  Aligned(const Aligned&) = delete;
  template <class T> T* as() const { return (T*)p; }
};

// Memory that grows and never shrinks; zeroed when it grows, so that padding is 0.
struct Buffer {
  char* p = nullptr;
  size_t size = 0;
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  ~Buffer() { ::operator delete(p, LINE); }
  template <class T> T* get(size_t n) {
    const size_t need = whole_lines(n * sizeof(T));
    if (need > size) {
      ::operator delete(p, LINE);
      p = (char*)::operator new(need, LINE);
      memset(p, 0, need);
      size = need;
    }
    return (T*)p;
  }
};

}  // namespace

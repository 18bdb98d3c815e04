// Vectors as wide as the processor's, bfloat16, and powers of two.
//
// The vectors are the compiler's own. Wider ones than the processor's would be kept in memory, not in registers.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512VNNI__)  // processors without it slow down for AVX-512
constexpr int WIDTH = 64;  // bytes of a vector
#elif defined(__AVX2__)
constexpr int WIDTH = 32;
#else
constexpr int WIDTH = 16;
#endif
constexpr int LANES = WIDTH / 4;  // floats of a vector

typedef float F __attribute__((vector_size(WIDTH)));
typedef int32_t I __attribute__((vector_size(WIDTH)));
typedef uint32_t U __attribute__((vector_size(WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

template <class T> T load(const void* p) { T v; memcpy(&v, p, sizeof v); return v; }
template <class T> void store(void* p, T v) { memcpy(p, &v, sizeof v); }
inline F splat(float x) { return F{} + x; }
inline I splat(int32_t x) { return I{} + x; }

inline float sum(F v) { float s[LANES]; store(s, v); for (int w = LANES / 2; w; w /= 2) for (int i = 0; i < w; i++) s[i] += s[i + w]; return s[0]; }
inline float greatest(F v) { float s[LANES]; store(s, v); for (int i = 1; i < LANES; i++) s[0] = std::max(s[0], s[i]); return s[0]; }

inline Halves to_bf16(F v) { const U u = (U)v; return __builtin_convertvector((u + 0x7fff + ((u >> 16) & 1)) >> 16, Halves); }  // nearest even
inline F from_bf16(Halves h) { return (F)(__builtin_convertvector(h, U) << 16); }
// Half precision, finite: exponents of bias 15 are read as those of bias 127, and the difference is multiplied in.
inline F from_f16(Halves h) {
#if defined(__AVX512VNNI__)
  return (F)_mm512_cvtph_ps((__m256i)h);
#else
  const U u = __builtin_convertvector(h, U);
  return (F)((U)((F)((u & 0x7fff) << 13) * 0x1p112f) | (u & 0x8000) << 16);
#endif
}
inline float from_f16(uint16_t h) {
  const uint32_t u = (uint32_t)(h & 0x7fff) << 13;
  float x;
  memcpy(&x, &u, 4);
  return h & 0x8000 ? -x * 0x1p112f : x * 0x1p112f;
}
// A number rounded to one that half precision holds, the nearest, ties to even; beyond the greatest one, that.
inline F half(F x) {
  x = x > 65504.f ? splat(65504.f) : x < -65504.f ? splat(-65504.f) : x;
  const U u = (U)x;
  const F normal = (F)((u + 0xfff + ((u >> 13) & 1)) & ~0x1fffu), steps = x * 0x1p24f + 12582912.f;
  const F small = (steps - 12582912.f) * 0x1p-24f;  // below the smallest normal one steps have one size
  return (x < 0 ? -x : x) < 0x1p-14f ? small : normal;
}
// Half precision of a number that it holds exactly.
inline uint16_t to_f16(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  const int exponent = (int)(u >> 23 & 255) - 112;
  const uint32_t small = (uint32_t)((x < 0 ? -x : x) * 0x1p24f);  // below the smallest normal one
  return (uint16_t)(u >> 16 & 0x8000) | (uint16_t)(exponent > 0 ? exponent << 10 | (u >> 13 & 0x3ff) : small);
}
inline uint16_t to_bf16(float x) { uint32_t u; memcpy(&u, &x, 4); return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16); }
inline float from_bf16(uint16_t h) { const uint32_t u = (uint32_t)h << 16; float x; memcpy(&x, &u, 4); return x; }

// 2^x for x <= 0 (or slightly above), relative error about 2e-7; below -126 the result is tiny, about 0.
inline F exp2_(F x) {
  x = x < -126.f ? splat(-126.f) : x;
  const F magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to a whole number in the low bits
  const F whole = (x + magic) - magic, f = x - whole;
  F p = splat(1.5403530e-4f);  // Taylor series of 2^f, |f| <= 1/2
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.f;
  return (F)((I)p + (__builtin_convertvector(whole, I) << 23));
}
constexpr float LOG2E = 1.44269504f;

}  // namespace

// Rows times a packed matrix (layout.h): the operation that takes nearly all the time of decoding.
//
// Each output is accumulated in one order, from the first input to the last, whatever the number of rows or threads:
// a row's result is bitwise the same in every batch. Only the dot products for which processors have instructions
// (pairs of bfloat16, quads of bytes) are written with intrinsics.

#pragma once

#include <utility>

#include "layout.h"
#include "vectors.h"
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512VNNI__)
constexpr int TILE = 12;        // rows of one tile, as many as fit into registers as sums
constexpr int SCALED_TILE = 8;  // the same with scales, where each group has sums of its own
#else
constexpr int TILE = 3, SCALED_TILE = 3;
#endif
constexpr int V = UNIT / LANES;  // vectors of one unit

typedef int16_t Shorts __attribute__((vector_size(WIDTH)));

// acc + the dot products of pairs of bfloat16 with one broadcast pair.
#if defined(__AVX512BF16__)
constexpr bool BF16_PAIRS = true;
inline F dot_pairs(F acc, I w, const void* x) {
  return (F)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)splat(load<int32_t>(x)));
}
#else
// x holds floats instead: a bfloat16 is the upper half of one.
constexpr bool BF16_PAIRS = false;
inline F dot_pairs(F acc, I w, const void* x) {
  acc += (F)((U)w << 16) * load<float>(x);
  return acc + (F)(w & (int32_t)0xffff0000) * load<float>((const float*)x + 1);
}
#endif

// acc + the dot products of quads of bytes of weights with one broadcast quad of signed ones; exact. `i8_quads` brings
// stored I8 weights into the form that it takes, in which they have the offset I8_OFFSET.
#if defined(__AVX512VNNI__)
constexpr bool QUADS = true;
constexpr int I8_OFFSET = 128;
inline I i8_quads(I stored) { return stored; }
inline I dot_quads(I acc, I w, const void* x) {
  return (I)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)splat(load<int32_t>(x)));
}
#elif defined(__ARM_FEATURE_DOTPROD)  // both signed: the offset goes with the highest bit
constexpr bool QUADS = true;
constexpr int I8_OFFSET = 0;
inline I i8_quads(I stored) { return stored ^ splat((int32_t)0x80808080); }
inline I dot_quads(I acc, I w, const void* x) {
  return (I)vdotq_s32((int32x4_t)acc, (int8x16_t)w, (int8x16_t)splat(load<int32_t>(x)));
}
#else
constexpr bool QUADS = false;
constexpr int I8_OFFSET = 128;
inline I i8_quads(I stored) { return stored; }
// x holds 16-bit values in the order 0, 2, 1, 3: bytes 0 and 2 of w widen by a mask, 1 and 3 by a shift. Products of
// byte pairs (pmaddubsw) could overflow 16 bits; those of 16-bit pairs fit.
inline I dot_quads(I acc, I w, const void* x) {
  const I even = w & 0x00ff00ff, odd = (I)((U)w >> 8) & 0x00ff00ff;
#if defined(__AVX2__)
  acc += (I)_mm256_madd_epi16((__m256i)even, (__m256i)splat(load<int32_t>(x)));
  return acc + (I)_mm256_madd_epi16((__m256i)odd, (__m256i)splat(load<int32_t>((const int16_t*)x + 2)));
#else
  const auto* s = (const int16_t*)x;
  acc += (even & 0xffff) * (int32_t)s[0] + (even >> 16) * (int32_t)s[1];
  return acc + (odd & 0xffff) * (int32_t)s[2] + (odd >> 16) * (int32_t)s[3];
#endif
}
#endif

// Where no instruction multiplies quads of bytes, the same for 32 inputs of 4-bit weights, whose products are small: at most
// 8 x 2 x 15 x 127 < 2^15, so that sums of pairs stay in 16 bits until the end. `Small` is what they are summed in.
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
typedef Shorts Small;
inline Small dot_small(Small acc, I w, const int8_t* x) {
  return acc + (Small)_mm256_maddubs_epi16((__m256i)w, (__m256i)splat(load<int32_t>(x)));
}
inline I widen(Small acc) { return (I)_mm256_madd_epi16((__m256i)acc, _mm256_set1_epi16(1)); }
#else
typedef I Small;
inline Small dot_small(Small acc, I w, const int8_t* x) {
  acc += (w & 255) * (int32_t)x[0] + ((w >> 8) & 255) * (int32_t)x[1];
  return acc + ((w >> 16) & 255) * (int32_t)x[2] + (w >> 24) * (int32_t)x[3];
}
inline I widen(Small acc) { return acc; }
#endif

constexpr int input_bytes(int kind) {
  return kind == F32 ? 4 : kind == BF16 ? (BF16_PAIRS ? 2 : 4) : (kind == I8 || kind == B8) && !QUADS ? 2 : 1;
}

// Rows of inputs in the form that a kind of matrix needs (input_bytes each). `stride` counts inputs.
struct Inputs {
  void* data;
  int stride;
  float* scales;         // of 8 and 4 bits: [row][stride / GROUP]; `planes` rows follow each other
  int32_t* corrections;  // of 8 bits: -(offset of the stored weights) * (sum of the inputs that share a weight scale)
  float* sums;           // of 4 bits: the sum of those inputs
};

// Prefetch weights of 8 and 4 bits 1 KiB ahead. The processor's own prefetcher is faster with wider ones, but does not
// keep up with these (one row, two Zen 3 cores: int8 1.14 times, int4 1.2 times).
inline void prefetch(const uint8_t* p) {
  for (int at = 0; at < 4 * UNIT; at += 64) __builtin_prefetch(p + 1024 + at);
}

// f(m, v) for all rows and vectors of a tile, unrolled, in the order that needs the fewest registers beside the sums: two
// vectors of weights fit where registers are many, the inputs of the rows where they are few.
template <int M, class Each> __attribute__((always_inline)) inline void each(Each f) {
  if constexpr (V == 2) {
#pragma GCC unroll 12
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) f(m, v);
  } else {
#pragma GCC unroll 8
    for (int v = 0; v < V; v++)
#pragma GCC unroll 12
      for (int m = 0; m < M; m++) f(m, v);
  }
}

// M rows times one unit; out[m][v] holds the outputs from v * LANES on.
template <int KIND, int M>
void tile(const Matrix& w, int unit, size_t bytes, int k, const Inputs& in, int row, F (*out)[V]) {
  const uint8_t* p = w.data + bytes * unit;
  const auto input = [&](int m, int i) { return (const int8_t*)in.data + ((size_t)(row + m) * in.stride + i) * input_bytes(KIND); };
  const auto word = [&](int v) { return load<I>(p + v * WIDTH); };
  if constexpr (KIND == F32 || KIND == BF16) {
    constexpr int PER = KIND == F32 ? 1 : 2;  // inputs of one word
    F acc[M][V] = {};
    for (int i = 0; i < k; i += PER, p += 4 * UNIT)
      each<M>([&](int m, int v) {
        if constexpr (KIND == F32) acc[m][v] += (F)word(v) * load<float>(input(m, i));
        else acc[m][v] = dot_pairs(acc[m][v], word(v), input(m, i));
      });
    each<M>([&](int m, int v) { out[m][v] = acc[m][v]; });
  } else {
    constexpr int FINE = KIND == I8 ? 0 : KIND == B8 ? 1 : 2;  // scales and minima of an output and a block
    constexpr int step = FINE ? BLOCK : GROUP;
    const int groups = in.stride / GROUP;
    const uint16_t* fine = FINE ? (const uint16_t*)w.scales + (size_t)unit * (round_up(k, GROUP) / step) * FINE * UNIT : nullptr;
    F total[M][V] = {};
    for (int g = 0; g < k; g += step) {
      I acc[M][V];
      const auto of_group = [&](const auto* all, int m) { return all[(size_t)(row + m) * (in.stride / step) + g / step]; };
      each<M>([&](int m, int v) { acc[m][v] = splat(FINE == 2 ? 0 : of_group(in.corrections, m)); });
      if constexpr (KIND == I8 || KIND == B8) {
        for (int i = g; i < g + step; i += 4, p += 4 * UNIT) {
          prefetch(p);
          each<M>([&](int m, int v) { acc[m][v] = dot_quads(acc[m][v], i8_quads(word(v)), input(m, i)); });
        }
      } else {
        const auto low = [&](int v) { return word(v) & 0x0f0f0f0f; };
        const auto high = [&](int v) { return (I)((U)word(v) >> 4) & 0x0f0f0f0f; };
        Small small[M][V] = {};
        for (int i = g; i < g + step; i += 8, p += 4 * UNIT) {
          prefetch(p);
          each<M>([&](int m, int v) {
            const int8_t* x = input(m, i);
            if constexpr (QUADS) acc[m][v] = dot_quads(dot_quads(acc[m][v], low(v), x), high(v), x + 4);
            else small[m][v] = dot_small(dot_small(small[m][v], low(v), x), high(v), x + 4);
          });
        }
        if constexpr (!QUADS) each<M>([&](int m, int v) { acc[m][v] += widen(small[m][v]); });
      }
      const auto scale = [&](int v) {
        if constexpr (FINE > 0) return from_f16(load<Halves>(fine + v * LANES));
        else return splat(1.f);
      };
      each<M>([&](int m, int v) {
        const float size = in.scales[(size_t)(row + m) * groups + g / GROUP];
        total[m][v] += __builtin_convertvector(acc[m][v], F) * (scale(v) * size);
        if constexpr (FINE == 2) total[m][v] += from_f16(load<Halves>(fine + UNIT + v * LANES)) * of_group(in.sums, m);
      });
      fine += FINE * UNIT;
    }
    each<M>([&](int m, int v) {
      out[m][v] = KIND == I8 ? total[m][v] * load<F>((const float*)w.scales + (size_t)unit * UNIT + v * LANES) : total[m][v];
    });
  }
}

using Tile = void (*)(const Matrix&, int, size_t, int, const Inputs&, int, F (*)[V]);
template <int KIND, int... M> Tile pick(int rows, std::integer_sequence<int, M...>) {
  static const Tile table[] = {tile<KIND, M + 1>...};
  return table[rows - 1];
}
Tile pick(int kind, int rows) {
  constexpr auto all = std::make_integer_sequence<int, TILE>();
  return kind == F32 ? pick<F32>(rows, all) : kind == BF16 ? pick<BF16>(rows, all)
       : kind == I8  ? pick<I8>(rows, all)  : kind == B8   ? pick<B8>(rows, all)
                     : pick<B4>(rows, all);  // I4 has the same weights
}

// rows x w for the units first..last; each tile goes to done(unit, row, rows, out).
template <class Done>
void product(const Matrix& w, size_t bytes, int k, const Inputs& in, int rows, int first, int last, Done done) {
  alignas(64) F out[TILE][V];
  // A whole number of rows with all their planes.
  const int most = w.kind == F32 || w.kind == BF16 ? TILE : SCALED_TILE / planes(w.kind) * planes(w.kind);
  for (int unit = first; unit < last; unit++)
    for (int row = 0; row < rows; row += most) {
      const int n = std::min(most, rows - row);
      pick(w.kind, n)(w, unit, bytes, k, in, row, out);
      done(unit, row, n, out);
    }
}

}  // namespace

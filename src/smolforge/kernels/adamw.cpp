// AdamW on bfloat16 in one pass over the memory (the formula is `update_at_once` in adamw.py), rounded with random bits that
// are a hash of the element's position.

#include <cmath>
#include <cstddef>

#include "threads.h"
#include "vectors.h"

namespace {

// "lowbias32", as `random_bits`.
inline uint32_t hash(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}
// Rounded up with the probability of the part that is cut off, for 16 random bits.
inline uint16_t rounded(float x, uint32_t bits) { uint32_t u; memcpy(&u, &x, 4); return (uint16_t)((u + bits) >> 16); }

}  // namespace

// rates: factors of the weight, m and sqrt(v), and epsilon. The four arrays have `count` elements and do not overlap.
EXPORT void smolforge_rounded_adamw(int64_t count, uint16_t* weight, const uint16_t* gradient, uint16_t* first, uint16_t* second,
                                        uint32_t key, const float* rates, float beta1, float beta2, int threads) {
  constexpr int64_t PIECE = 1 << 14;
  const float keep = rates[0], size = rates[1], root = rates[2], epsilon = rates[3], add1 = 1 - beta1, add2 = 1 - beta2;
  parallel_for((int)((count + PIECE - 1) / PIECE), threads, [=](int piece) {
    const int64_t start = piece * PIECE;
    const int n = (int)std::min(PIECE, count - start);
    // A plain loop, which compilers vectorize.
    uint16_t *__restrict w = weight + start, *__restrict m = first + start, *__restrict v = second + start;
    const uint16_t* __restrict g = gradient + start;
    const uint32_t from = key + (uint32_t)start;
    for (int i = 0; i < n; i++) {
      const float slope = from_bf16(g[i]), mean = beta1 * from_bf16(m[i]) + add1 * slope;
      const float square = beta2 * from_bf16(v[i]) + add2 * slope * slope;
      const float moved = from_bf16(w[i]) * keep - size * mean / (std::sqrt(square) * root + epsilon);
      const uint32_t bits = hash(from + (uint32_t)i);
      w[i] = rounded(moved, bits & 0xffff);
      m[i] = to_bf16(mean);
      v[i] = rounded(square, bits >> 16);
    }
  });
}

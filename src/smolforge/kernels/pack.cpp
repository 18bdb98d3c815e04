// Pack the rows of a checkpoint, wherever they are mapped, into the layout of layout.h.
//
// One pass without copies: 32 rows are read, rounded to their kind and written side by side. The numbers are those of
// tests/quantized.py. Of every kind, a packed row is a row of 32-bit words; a unit holds the words at one position of
// its 32 rows next to each other.

#include <cmath>

#include "layout.h"
#include "threads.h"
#include "vectors.h"

namespace {

inline float nearest(float x) { return (x + 12582912.f) - 12582912.f; }  // half to even, for |x| < 2^22
inline float nearest4(float x) { return std::min(7.f, std::max(-8.f, nearest(x))); }

// One row of k floats (padded with zeros to `padded`) as words of its kind; its scales go to every 32nd element.
void pack_row(int kind, int group, const float* row, int padded, uint32_t* words, void* scales, int lane) {
  if (kind == F32) {
    memcpy(words, row, sizeof(float) * padded);
  } else if (kind == BF16) {
    auto* out = (uint16_t*)words;
    for (int i = 0; i < padded; i++) out[i] = to_bf16(row[i]);
  } else if (kind == I8) {
    float peak = 0;
    for (int i = 0; i < padded; i++) peak = std::max(peak, std::fabs(row[i]));
    const float scale = peak / 127, inverse = scale > 0 ? 1 / scale : 0;
    auto* out = (uint8_t*)words;
    for (int i = 0; i < padded; i++) out[i] = (uint8_t)((int)nearest(row[i] * inverse) + 128);
    ((float*)scales)[lane] = scale;
  } else {
    auto* out = (uint8_t*)words;
    for (int g = 0; g < padded; g += group) {
      const float* w = row + g;
      float peak = w[0];
      for (int i = 1; i < group; i++) peak = std::fabs(w[i]) > std::fabs(peak) ? w[i] : peak;
      float best = 0, least = INFINITY;
      for (const float divisor : {-8.f, -7.6f, -7.2f, -6.8f, 7.f, -8.6f}) {
        const float scale = from_bf16(to_bf16(peak / divisor)), by = scale == 0 ? 1.f : scale;
        float error = 0;
        for (int i = 0; i < group; i++) { const float e = nearest4(w[i] / by) * scale - w[i]; error += e * e; }
        if (error < least) least = error, best = scale;
      }
      ((uint16_t*)scales)[(size_t)(g / group) * UNIT + lane] = to_bf16(best);
      const float by = best == 0 ? 1.f : best;
      uint8_t values[64];
      for (int i = 0; i < group; i++) values[i] = (uint8_t)((int)nearest4(w[i] / by) + 8);
      for (int i = 0; i < group; i += 8)  // a byte holds inputs i and i + 4
        for (int j = 0; j < 4; j++) out[(g + i) / 2 + j] = values[i + j] | values[i + 4 + j] << 4;
    }
  }
}

// 32 rows of a matrix into a unit of `words` words per row.
void pack_unit(int kind, int group, int k, int padded, int words, const void* const* rows, int is_bf16, uint32_t* out, void* scales) {
  thread_local std::vector<float> row;
  thread_local std::vector<uint32_t> packed;
  row.resize(padded), packed.resize((size_t)UNIT * words);
  for (int lane = 0; lane < UNIT; lane++) {
    const void* from = rows[lane];
    std::fill(row.begin() + (from ? k : 0), row.end(), 0.f);
    if (from && is_bf16) for (int i = 0; i < k; i++) row[i] = from_bf16(((const uint16_t*)from)[i]);
    else if (from) memcpy(row.data(), from, sizeof(float) * k);
    pack_row(kind, group, row.data(), padded, &packed[(size_t)lane * words], scales, lane);
  }
  for (int w = 0; w < words; w += 16)  // 16 words of a row are one cache line
    for (int lane = 0; lane < UNIT; lane++)
      for (int j = w; j < std::min(words, w + 16); j++) out[(size_t)j * UNIT + lane] = packed[(size_t)lane * words + j];
}

// Half precision of a number that it holds exactly.
inline uint16_t to_f16(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  const int exponent = (int)(u >> 23 & 255) - 112;
  const uint32_t small = (uint32_t)(std::fabs(x) * 0x1p24f);  // below the smallest normal one
  return (uint16_t)(u >> 16 & 0x8000) | (uint16_t)(exponent > 0 ? exponent << 10 | (u >> 13 & 0x3ff) : small);
}

// 32 rows of GGUF's blocks (32 weights each; docs: ggml-common.h) into a unit. `bits` is 8 for Q8_0, else 4: of Q4_0, or of
// Q4_1 where `minima`.
void pack_blocks(int bits, bool minima, int k, int padded, const uint8_t* const* rows, uint32_t* out, uint16_t* scales) {
  const int bytes = bits == 8 ? 34 : minima ? 20 : 18, each = bits == 8 ? 1 : 2;
  for (int lane = 0; lane < UNIT; lane++)
    for (int b = 0; rows[lane] && b < k / 32; b++) {
      const uint8_t* block = rows[lane] + (size_t)b * bytes;
      uint16_t* scale = scales + (size_t)b * each * UNIT + lane;
      memcpy(scale, block, 2);
      if (minima) memcpy(scale + UNIT, block + 2, 2);
      else if (bits == 4) scale[UNIT] = to_f16(-8 * from_f16(*scale));
      const uint8_t* q = block + (minima ? 4 : 2);
      uint8_t values[32];
      for (int i = 0; i < 32; i++) values[i] = bits == 8 ? q[i] + 128 : i < 16 ? q[i] & 15 : q[i - 16] >> 4;
      for (int w = 0; w < bits; w++) {  // words of this block
        uint8_t word[4];
        for (int j = 0; j < 4; j++) word[j] = bits == 8 ? values[4 * w + j] : values[8 * w + j] | values[8 * w + 4 + j] << 4;
        memcpy(out + ((size_t)b * bits + w) * UNIT + lane, word, 4);
      }
    }
}

}  // namespace

// As smolforge_pack, of rows of GGUF's blocks; the numbers stay those of the file. k is a multiple of 32; data and scales are
// zeros before.
EXPORT void smolforge_pack_blocks(int bits, int minima, int units, int k, int padded, const uint8_t* const* rows, uint8_t* data,
                                  uint8_t* scales, int threads) {
  const size_t words = (size_t)padded * bits / 32 * UNIT, each = (size_t)padded / 32 * UNIT * (bits == 8 ? 1 : 2);
  parallel_for(units, threads, [&](int unit) {
    pack_blocks(bits, minima, k, padded, rows + (size_t)unit * UNIT, (uint32_t*)data + words * unit, (uint16_t*)scales + each * unit);
  });
}

// rows: `units * 32` pointers to k floats or bfloat16s, null for padding; `padded` is k rounded up to 64.
EXPORT void smolforge_pack(int kind, int group, int units, int k, int padded, const void* const* rows, int is_bf16,
                           uint8_t* data, uint8_t* scales, int threads) {
  const int words = kind == F32 ? padded : kind == BF16 ? padded / 2 : kind == I8 ? padded / 4 : padded / 8;
  const size_t scale_bytes = kind == I8 ? UNIT * 4 : kind == I4 ? (size_t)padded / group * UNIT * 2 : 0;
  parallel_for(units, threads, [&](int unit) {
    auto* out = (uint32_t*)data + (size_t)unit * UNIT * words;
    pack_unit(kind, group, k, padded, words, rows + (size_t)unit * UNIT, is_bf16, out, scales + scale_bytes * unit);
  });
}

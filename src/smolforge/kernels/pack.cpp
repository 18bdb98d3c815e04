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

}  // namespace

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

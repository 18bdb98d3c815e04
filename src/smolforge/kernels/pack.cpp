// Pack the rows of a checkpoint, wherever they are mapped, into the layout of layout.h.
//
// One pass without copies: 32 rows are read, rounded to their kind and written side by side. The numbers are those of
// tests/quantized.py. Of every kind, a packed row is a row of 32-bit words; a unit holds the words at one position of
// its 32 rows next to each other.

#include <cmath>

#include "layout.h"
#include "quantize.h"
#include "threads.h"
#include "vectors.h"

namespace {

inline float nearest(float x) { return (x + 12582912.f) - 12582912.f; }  // half to even, for |x| < 2^22

// One row of k floats (padded with zeros to `padded`) as words of its kind; its scales go to every 32nd element.
void pack_row(int kind, const float* row, int padded, uint32_t* words, void* scales, int lane) {
  if (kind == F32) {
    memcpy(words, row, sizeof(float) * padded);
  } else if (kind == BF16) {
    auto* out = (uint16_t*)words;
    for (int i = 0; i < padded; i++) out[i] = to_bf16(row[i]);
  } else {
    float peak = 0;
    for (int i = 0; i < padded; i++) peak = std::max(peak, std::fabs(row[i]));
    const float scale = peak / 127, inverse = scale > 0 ? 1 / scale : 0;
    auto* out = (uint8_t*)words;
    for (int i = 0; i < padded; i++) out[i] = (uint8_t)((int)nearest(row[i] * inverse) + 128);
    ((float*)scales)[lane] = scale;
  }
}

// A row of k floats or bfloat16s, null for zeros, as `padded` floats.
void read_row(const void* from, int is_bf16, int k, int padded, float* row) {
  std::fill(row + (from ? k : 0), row + padded, 0.f);
  if (from && is_bf16) for (int i = 0; i < k; i++) row[i] = from_bf16(((const uint16_t*)from)[i]);
  else if (from) memcpy(row, from, sizeof(float) * k);
}

// 32 rows of a matrix into a unit of `words` words per row.
void pack_unit(int kind, int k, int padded, int words, const void* const* rows, int is_bf16, uint32_t* out, void* scales) {
  thread_local std::vector<float> row;
  thread_local std::vector<uint32_t> packed;
  row.resize(padded), packed.resize((size_t)UNIT * words);
  for (int lane = 0; lane < UNIT; lane++) {
    read_row(rows[lane], is_bf16, k, padded, row.data());
    pack_row(kind, row.data(), padded, &packed[(size_t)lane * words], scales, lane);
  }
  for (int w = 0; w < words; w += 16)  // 16 words of a row are one cache line
    for (int lane = 0; lane < UNIT; lane++)
      for (int j = w; j < std::min(words, w + 16); j++) out[(size_t)j * UNIT + lane] = packed[(size_t)lane * words + j];
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

// 32 rows of a matrix in four bits: as blocks of GGUF, and those into a unit.
void pack_nibbles(int k, int padded, const void* const* rows, int is_bf16, uint32_t* out, uint16_t* scales) {
  const int whole = round_up(k, BLOCK), bytes = whole / BLOCK * 20;
  std::vector<float> numbers((size_t)UNIT * whole), importance(whole);
  std::vector<uint8_t> blocks((size_t)UNIT * bytes);
  std::fill(importance.begin(), importance.begin() + k, 1.f);
  const float* from[UNIT];
  uint8_t* to[UNIT];
  for (int lane = 0; lane < UNIT; lane++) {
    from[lane] = &numbers[(size_t)lane * whole], to[lane] = &blocks[(size_t)lane * bytes];
    read_row(rows[lane], is_bf16, k, whole, &numbers[(size_t)lane * whole]);
  }
  for (int lane = 0; lane < UNIT; lane += LANES) quantize_rows(true, from + lane, LANES, whole, importance.data(), to + lane);
  pack_blocks(4, true, whole, padded, to, out, scales);
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
EXPORT void smolforge_pack(int kind, int units, int k, int padded, const void* const* rows, int is_bf16, uint8_t* data,
                           uint8_t* scales, int threads) {
  const int words = kind == F32 ? padded : kind == BF16 ? padded / 2 : kind == I8 ? padded / 4 : padded / 8;
  const size_t scale_bytes = kind == I8 ? UNIT * 4 : kind == I4 ? (size_t)padded / BLOCK * 2 * UNIT * 2 : 0;
  parallel_for(units, threads, [&](int unit) {
    auto* out = (uint32_t*)data + (size_t)unit * UNIT * words;
    uint8_t* fine = scales + scale_bytes * unit;
    const void* const* from = rows + (size_t)unit * UNIT;
    if (kind == I4) pack_nibbles(k, padded, from, is_bf16, out, (uint16_t*)fine);
    else pack_unit(kind, k, padded, words, from, is_bf16, out, fine);
  });
}

// weights (n, k), k a multiple of 32, as blocks of GGUF (n, k / 32): Q4_1 with `minima`, else Q4_0. The errors of a column count
// by its importance.
EXPORT void smolforge_quantize(int minima, int n, int k, const float* weights, const float* importance, uint8_t* blocks, int threads) {
  const size_t bytes = (size_t)k / BLOCK * (minima ? 20 : 18);
  parallel_for((n + LANES - 1) / LANES, threads, [&](int item) {
    const int first = item * LANES, count = std::min(LANES, n - first);
    const float* from[LANES];
    uint8_t* to[LANES];
    for (int i = 0; i < count; i++) from[i] = weights + (size_t)(first + i) * k, to[i] = blocks + bytes * (first + i);
    quantize_rows(minima, from, count, k, importance, to);
  });
}

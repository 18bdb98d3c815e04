// The layout of weights, keys and values for decoding.
//
// A matrix is cut into units of 32 output rows. Inside a unit the inputs come first, so that one 64-byte vector holds the
// same few inputs of 16 outputs (narrower vectors hold those of fewer). One multiply-add with a broadcast input then serves
// all of them, nothing is summed across a vector, and memory is read strictly forward.
//
//   kind  layout of a unit                                  inputs
//   F32   [k][32] float                                     float
//   BF16  [k/2][32][2] bfloat16                             bfloat16 where the processor multiplies such pairs,
//                                                           else float; sums in fp32
//   I8    [k/4][32][4] value + 128; a scale per output      int8 with a scale per 64 inputs, widened to 16 bits
//                                                           where the processor does not multiply quads of bytes
//   I4    [k/8][32][4] bytes of two 4-bit values from 0;    int8 with a scale per 64 inputs
//         a scale and a minimum per output and 32 inputs
//   B8    as I8, with a scale per output and 32 inputs      as I8, twice: what the first rounding leaves is rounded too
//   B4    as I4                                             as B8
//
// I4, B8 and B4 hold the blocks of GGUF files, number for number: Q8_0, Q4_0 (whose minimum is -8 scales) and Q4_1. The inputs
// of B8 and B4 have 15 bits, so that the results are those of the file's numbers; on one row this costs no time, as memory
// limits it.

#pragma once

#include <cstddef>
#include <cstdint>

enum Kind { F32, BF16, I8, I4, B8, B4 };
constexpr int UNIT = 32;   // outputs of one unit
constexpr int GROUP = 64;  // inputs that share one activation scale
constexpr int BLOCK = 32;  // inputs that share a weight scale in I4, B8 and B4

extern "C" struct Matrix {  // as packed by pack.cpp
  int32_t kind, n, k;       // outputs and inputs, before padding
  const uint8_t* data;
  const void* scales;       // I8: float [units][32]; B8: half precision [units][k / 32][32];
                            // I4, B4: [units][k / 32][2][32], scales and minima
  const float* bias;        // [units][32] added to the outputs, or null
};

inline int planes(int kind) { return kind == B8 || kind == B4 ? 2 : 1; }  // rows of inputs for one row
constexpr bool is_nibbles(int kind) { return kind == I4 || kind == B4; }
inline int round_up(int n, int to) { return (n + to - 1) / to * to; }
inline int bytes_per_input(int kind) { return kind == F32 ? 4 : kind == BF16 ? 2 : 1; }  // of a weight; of nibbles half of it
inline size_t unit_bytes(const Matrix& w) {
  const size_t k = round_up(w.k, GROUP);
  return is_nibbles(w.kind) ? k * UNIT / 2 : k * UNIT * bytes_per_input(w.kind);
}

// Four bits per weight: 32 weights of a row become values from 0 to 15 with a scale and a minimum in half precision.
//
// Both are searched for, of as many rows at once as a vector has lanes. Ranges that are cut at either end are tried; each is
// fitted to the values it gives by least squares, and the one with the smallest error wins. generation/quantize.py has the
// same search in torch.

#pragma once

#include <cmath>

#include "layout.h"
#include "vectors.h"

namespace {

struct Grids { F scale, minimum; };  // of LANES rows: weight = scale * value + minimum

inline F nearest(F x) { const F magic = splat(12582912.f); return (x + magic) - magic; }  // half to even, for |x| < 2^22

inline F on_grid(F w, Grids g) {  // the values of weights, 0 to 15
  const F value = nearest((w - g.minimum) * (g.scale == 0 ? F{} : 1.f / g.scale));
  return value < 0 ? F{} : value > 15 ? splat(15.f) : value;
}

// The grids for weights w[32] whose errors count by `importance`. Without `minima` the minimum is -8 scales.
inline Grids best_grids(const F* w, const float* importance, bool minima) {
  constexpr int CUTS = 4, FITS = 2;
  F low = w[0], high = w[0], weighted{}, least = splat(INFINITY);
  float total = 0;
  for (int i = 0; i < BLOCK; i++) {
    low = w[i] < low ? w[i] : low, high = w[i] > high ? w[i] : high;
    weighted += importance[i] * w[i], total += importance[i];
  }
  const F range = high - low, peak = high > -low ? high : low;
  Grids best{};
  const auto fitted = [&](Grids& g) {  // keep `g` if it is better; what fits its values best
    g.scale = half(g.scale), g.minimum = minima ? half(g.minimum) : -8 * g.scale;
    F error{}, q{}, qq{}, qw{};
    for (int i = 0; i < BLOCK; i++) {
      const F value = on_grid(w[i], g), by = importance[i] * value, off = value * g.scale + g.minimum - w[i];
      error += importance[i] * off * off, q += by, qq += by * value, qw += by * w[i];
    }
    const auto better = error < least;
    least = better ? error : least, best.scale = better ? g.scale : best.scale, best.minimum = better ? g.minimum : best.minimum;
    if (!minima) {
      const F squares = qq - 16 * q + 64 * total;
      return Grids{squares > 0 ? (qw - 8 * weighted) / squares : g.scale, g.minimum};
    }
    const F determinant = total * qq - q * q, scale = (total * qw - q * weighted) / determinant;
    const auto solvable = determinant > 1e-6f * total * qq;
    return Grids{solvable ? scale : g.scale, solvable ? (weighted - scale * q) / total : g.minimum};
  };
  for (int i = 0; i < CUTS * CUTS; i++) {
    const float below = 0.06f * (i / CUTS), above = 0.06f * (i % CUTS), divisor = i < 12 ? 0.25f * i - 8.8f : 12.4f - 0.4f * i;
    Grids g = minima ? Grids{range * ((1 - below - above) / 15), low + below * range} : Grids{peak / divisor, F{}};
    for (int fit = 0; fit < FITS; fit++) g = fitted(g);
    fitted(g);
  }
  return best;
}

// Up to LANES rows of k floats (a multiple of 32) as blocks of GGUF: Q4_1 with `minima`, else Q4_0.
inline void quantize_rows(bool minima, const float* const* rows, int count, int k, const float* importance, uint8_t* const* out) {
  const int bytes = minima ? 20 : 18;
  for (int b = 0; b < k / BLOCK; b++) {
    float numbers[BLOCK][LANES] = {}, scale[LANES], minimum[LANES];
    for (int row = 0; row < count; row++)
      for (int i = 0; i < BLOCK; i++) numbers[i][row] = rows[row][b * BLOCK + i];
    F w[BLOCK];
    for (int i = 0; i < BLOCK; i++) w[i] = load<F>(numbers[i]);
    const Grids g = best_grids(w, importance + b * BLOCK, minima);
    store(scale, g.scale), store(minimum, g.minimum);
    for (int i = 0; i < BLOCK; i++) store(numbers[i], on_grid(w[i], g));
    for (int row = 0; row < count; row++) {
      uint8_t* block = out[row] + (size_t)b * bytes;
      store(block, to_f16(scale[row]));
      if (minima) store(block + 2, to_f16(minimum[row]));
      uint8_t* q = block + bytes - BLOCK / 2;
      for (int i = 0; i < BLOCK / 2; i++) q[i] = (uint8_t)((int)numbers[i][row] | (int)numbers[i + BLOCK / 2][row] << 4);
    }
  }
}

}  // namespace

// Cross-entropy of a chunk of tokens; the logits are overwritten with its gradient.
//
// A row of logits is read from memory once and its gradient written once. In between, the row is in fp32 in the second-level
// cache. The formula is that of `torch_chunk_loss` in model/loss.py.

#include <cmath>

#include "threads.h"
#include "vectors.h"

namespace {

inline F wide(const uint16_t* p) { return from_bf16(load<Halves>(p)); }
inline F wide(const float* p) { return load<F>(p); }
inline float wide(uint16_t x) { return from_bf16(x); }
inline float wide(float x) { return x; }
inline void put(uint16_t* p, F v) { store(p, to_bf16(v)); }
inline void put(float* p, F v) { store(p, v); }
inline void put(uint16_t* p, float x) { *p = to_bf16(x); }
inline void put(float* p, float x) { *p = x; }

// Cross-entropy and z-loss of one row. `scratch`: `words` floats, rounded up to whole vectors.
template <class T> void row(T* logits, int64_t words, int64_t target, float scale, float z_weight, float* scratch, double* cross_entropy, double* z_loss) {
  const int64_t whole = words / LANES * LANES;
  F most = splat(-INFINITY);
  for (int64_t i = 0; i < whole; i += LANES) {
    const F v = wide(logits + i);
    store(scratch + i, v);
    most = v > most ? v : most;
  }
  if (whole < words) {
    for (int64_t i = whole; i < whole + LANES; i++) scratch[i] = i < words ? wide(logits[i]) : -INFINITY;
    const F v = load<F>(scratch + whole);
    most = v > most ? v : most;
  }
  const float peak = greatest(most), logit = scratch[target];
  double total = 0;
  for (int64_t i = 0; i < words;) {
    F part = {};
    for (const int64_t end = std::min(words, i + 64 * LANES); i < end; i += LANES) {
      const F e = exp2_((load<F>(scratch + i) - peak) * LOG2E);
      store(scratch + i, e);
      part += e;
    }
    total += sum(part);
  }
  const double log_z = peak + std::log(total);
  *cross_entropy = log_z - logit;
  *z_loss = z_weight * log_z * log_z;
  // d/dlogits of log_z - logit[target] + w log_z^2 is p (1 + 2 w log_z) - [word = target].
  const float factor = (float)(scale * (1 + 2 * z_weight * log_z) / total);
  for (int64_t i = 0; i < whole; i += LANES) put(logits + i, load<F>(scratch + i) * factor);
  for (int64_t i = whole; i < words; i++) put(logits + i, scratch[i] * factor);
  put(logits + target, scratch[target] * factor - scale);
}

template <class T> void rows(int64_t count, int64_t words, T* logits, const int64_t* targets, int64_t ignored, const float* scales,
                             float z_weight, double* cross_entropy, double* z_loss, int threads) {
  constexpr int ROWS = 16;  // that a thread takes at a time
  parallel_for((int)((count + ROWS - 1) / ROWS), threads, [&](int part) {
    std::vector<float> scratch(words + LANES);
    for (int64_t r = (int64_t)part * ROWS; r < std::min(count, (int64_t)(part + 1) * ROWS); r++) {
      T* at = logits + r * words;
      if (targets[r] == ignored) std::fill(at, at + words, T{}), cross_entropy[r] = z_loss[r] = 0;
      else row(at, words, targets[r], scales[r], z_weight, scratch.data(), cross_entropy + r, z_loss + r);
    }
  });
}

}  // namespace

// logits: (count, words), fp32 or bfloat16, overwritten; targets: (count,) below `words`, or `ignored`; scales: (count,).
EXPORT void smolforge_loss(int64_t count, int64_t words, void* logits, int is_bf16, const int64_t* targets, int64_t ignored,
                               const float* scales, float z_weight, double* cross_entropy, double* z_loss, int threads) {
  if (is_bf16) rows(count, words, (uint16_t*)logits, targets, ignored, scales, z_weight, cross_entropy, z_loss, threads);
  else rows(count, words, (float*)logits, targets, ignored, scales, z_weight, cross_entropy, z_loss, threads);
}

// Causal attention for training in bfloat16 on a CPU that multiplies pairs of it: forward and backward.
//
// A unit is 32 queries of one head, side by side in the lanes of two vectors. All else follows from that: scores are
// computed transposed, keys down and queries across, so softmax goes down the rows and is never summed across a
// vector, and every product is the same one, rows of broadcast pairs times packed pairs of 32 columns:
//
//   forward    scores^T (keys, q)  = K (keys, d)      x  Q as pairs of d (d/2, q)
//              out^T    (d, q)     = V^T (d, keys)    x  weights as pairs of keys (keys/2, q)
//   backward   scores^T as above; weights by the log-sum that the forward pass kept
//              dweights^T (keys, q) = V (keys, d)     x  dOut as pairs of d
//              dV (keys, d)       += weights^T        x  dOut as pairs of queries (q/2, d)
//              dK (keys, d)       += dscores^T        x  Q as pairs of queries
//              dQ^T (d, q)         = K^T (d, keys)    x  dscores as pairs of keys
//
// with dscores = weights (dweights - sum over d of out dOut), as in FlashAttention (Dao et al. 2022, arXiv:2205.14135).
// Scores of one unit exist at a time (keys x 32 floats), in the second-level cache. Sums are in fp32; weights and
// dscores are rounded to bfloat16 where they enter a product. One thread does all units of one key/value head of one
// sequence in order, so gradients are summed in one order whatever the number of threads.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "memory.h"
#include "threads.h"

#if defined(__AVX512BF16__) && defined(__AVX512VL__) && defined(__AVX512BW__)
#include <immintrin.h>

extern "C" {
// bfloat16 (sequence, head, position, d) with strides in elements; d is contiguous.
struct Tensor4 { uint16_t* data; int64_t sequence, head, position; };
struct Sizes { int32_t sequences, heads, kv_heads, length, d, threads; };
}

namespace {

constexpr int Q = 32, M = 12;  // queries of a unit; rows of a tile: 12 x 2 sums fill the registers
using F = __m512;
using I = __m512i;

inline uint16_t* row(const Tensor4& t, int sequence, int head, int position) {
  return t.data + sequence * t.sequence + head * t.head + position * t.position;
}

// N rows (broadcast pairs) times `steps` packed pairs of 32 columns, from zero or from what is in `to`, into `to` (rows
// `to_stride` floats apart). The sums are an array of its own, so that the compiler keeps them in registers.
template <int N, bool ADD> inline void tile(const uint16_t* rows, size_t stride, const uint32_t* pairs, int steps, float* to, size_t to_stride) {
  F sum[N][2];
#pragma GCC unroll 12
  for (int m = 0; m < N; m++) {
    sum[m][0] = ADD ? _mm512_loadu_ps(to + m * to_stride) : _mm512_setzero_ps();
    sum[m][1] = ADD ? _mm512_loadu_ps(to + m * to_stride + 16) : _mm512_setzero_ps();
  }
  for (int s = 0; s < steps; s++) {
    const I left = _mm512_load_si512(pairs + s * 32), right = _mm512_load_si512(pairs + s * 32 + 16);
#pragma GCC unroll 12
    for (int m = 0; m < N; m++) {
      int32_t pair;
      memcpy(&pair, rows + m * stride + 2 * s, 4);
      const I x = _mm512_set1_epi32(pair);
      sum[m][0] = _mm512_dpbf16_ps(sum[m][0], (__m512bh)left, (__m512bh)x);
      sum[m][1] = _mm512_dpbf16_ps(sum[m][1], (__m512bh)right, (__m512bh)x);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < N; m++) {
    _mm512_storeu_ps(to + m * to_stride, sum[m][0]);
    _mm512_storeu_ps(to + m * to_stride + 16, sum[m][1]);
  }
}
// The same for n rows, n even.
template <bool ADD> void product(const uint16_t* rows, size_t stride, int n, const uint32_t* pairs, int steps, float* to, size_t to_stride) {
  int m = 0;
  const auto at = [&](auto&& f, int count) { f(rows + m * stride, stride, pairs, steps, to + m * to_stride, to_stride); m += count; };
  if (n % 8 == 0 && n % M) while (m < n) at(tile<8, ADD>, 8);
  while (n - m >= M) at(tile<M, ADD>, M);
  while (n - m >= 4) at(tile<4, ADD>, 4);
  while (n - m >= 2) at(tile<2, ADD>, 2);
}

// 2^x, relative error below 1e-5, far inside what bfloat16 keeps; 0 for x < -126.
inline F exp2_(F x) {
  const __mmask16 live = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.f), _CMP_GE_OQ);
  const F whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = _mm512_sub_ps(x, whole);
  F p = _mm512_set1_ps(9.6181291e-3f);  // Taylor series of 2^f, |f| <= 1/2
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.f));
  return _mm512_maskz_scalef_ps(live, p, whole);
}
constexpr float LOG2E = 1.44269504f;

inline I rounded(F v) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(v)); }
inline I pair(F first, F second) { return _mm512_or_si512(rounded(first), _mm512_slli_epi32(rounded(second), 16)); }

// 32 positions of a head as pairs of d: (d/2, 32). Positions from `count` on are zero.
void pack_d(const Tensor4& t, int sequence, int head, int position, int count, int d, uint32_t* pairs) {
  for (int i = 0; i < Q; i++) {
    if (i >= count) { for (int s = 0; s < d / 2; s++) pairs[s * Q + i] = 0; continue; }
    const auto* from = (const uint16_t*)row(t, sequence, head, position + i);
    for (int s = 0; s < d / 2; s++) memcpy(&pairs[s * Q + i], from + 2 * s, 4);
  }
}
// 32 positions of a head as pairs of positions, in blocks of 32 columns: (d/32, 16, 32).
void pack_q(const Tensor4& t, int sequence, int head, int position, int count, int d, uint32_t* pairs) {
  for (int i = 0; i < Q; i += 2)
    for (int c = 0; c < d; c += 16) {
      const auto at = [&](int p) {
        return p < count ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(row(t, sequence, head, position + p) + c))) : _mm512_setzero_si512();
      };
      _mm512_store_si512(pairs + (c / 32 * (Q / 2) + i / 2) * 32 + c % 32, _mm512_or_si512(at(i), _mm512_slli_epi32(at(i + 1), 16)));
    }
}
// All positions of a head with d down: (d, padded), zero from `length` on.
void transpose(const Tensor4& t, int sequence, int head, int length, int padded, int d, uint16_t* to) {
  for (int p = 0; p < padded; p++)
    for (int c = 0; c < d; c++) to[(size_t)c * padded + p] = p < length ? row(t, sequence, head, p)[c] : 0;
}
// A unit's (d, 32) floats, each query times its factor, into its rows. `scratch` holds d x 32 bfloat16.
void unpack(const float* from, const float* factor, uint16_t* scratch, const Tensor4& t, int sequence, int head, int position, int count, int d) {
  const F left = _mm512_load_ps(factor), right = _mm512_load_ps(factor + 16);
  for (int c = 0; c < d; c++)
    _mm512_store_si512(scratch + c * Q, (I)_mm512_cvtne2ps_pbh(_mm512_mul_ps(_mm512_load_ps(from + c * Q + 16), right), _mm512_mul_ps(_mm512_load_ps(from + c * Q), left)));
  for (int i = 0; i < count; i++) {
    uint16_t* to = row(t, sequence, head, position + i);
    for (int c = 0; c < d; c++) to[c] = scratch[c * Q + i];
  }
}

// Which queries of a unit see key `k`: those not before it, whose document does not begin after it.
struct Visible {
  I lane0, lane1, first0, first1;
  int begin;  // even; no query of the unit sees a key before it
  Visible(const int32_t* first, int position, int count) {
    alignas(64) int32_t f[Q];
    begin = first ? first[0] : 0;
    for (int i = 0; i < Q; i++) { f[i] = first ? first[std::min(i, count - 1)] : 0; begin = std::min(begin, f[i]); }
    begin &= ~1;
    const I step = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    lane0 = _mm512_add_epi32(step, _mm512_set1_epi32(position)), lane1 = _mm512_add_epi32(lane0, _mm512_set1_epi32(16));
    first0 = _mm512_load_si512(f), first1 = _mm512_load_si512(f + 16);
    free_from = *std::max_element(f, f + Q), free_to = position;
  }
  int free_from, free_to;  // keys between these are seen by all
  bool all(int k) const { return k >= free_from && k <= free_to; }
  __mmask16 mask(int k, int v) const {
    const I key = _mm512_set1_epi32(k);
    return _mm512_cmple_epi32_mask(key, v ? lane1 : lane0) & _mm512_cmple_epi32_mask(v ? first1 : first0, key);
  }
};

}  // namespace

EXPORT int smolforge_attention_available() { return 1; }

// log_sums: (sequences, heads, length) fp32, of the scores in powers of two. first: (sequences, length) the first key that
// each query may see, or null.
EXPORT void smolforge_attention(const Sizes* sizes, const Tensor4* q, const Tensor4* k, const Tensor4* v, const int32_t* first,
                                    const Tensor4* out, float* log_sums) {
  const Sizes z = *sizes;
  const int group = z.heads / z.kv_heads, padded = (z.length + Q - 1) / Q * Q, d = z.d;
  const F scale = _mm512_set1_ps(LOG2E / std::sqrt((float)d));
  parallel_for(z.sequences * z.kv_heads, z.threads, [&](int item) {
    const int b = item / z.kv_heads, kv = item % z.kv_heads;
    Aligned values_(2 * (size_t)d * padded), scores_(4 * (size_t)padded * Q), weights_(4 * (size_t)padded / 2 * Q), packed_(2 * Q * d), sums_(4 * d * Q);
    auto* values = values_.as<uint16_t>();
    auto* scores = scores_.as<float>();
    auto* weights = weights_.as<uint32_t>();
    auto* packed = packed_.as<uint32_t>();
    transpose(*v, b, kv, z.length, padded, d, values);
    for (int head = kv * group; head < (kv + 1) * group; head++)
      for (int at = 0; at < z.length; at += Q) {
        const int count = std::min(Q, z.length - at), keys = at + count;
        const Visible visible(first ? first + (size_t)b * z.length + at : nullptr, at, count);
        const int even = keys & ~1;
        pack_d(*q, b, head, at, count, d, packed);
        product<false>(row(*k, b, kv, visible.begin), k->position, even - visible.begin, packed, d / 2, scores + visible.begin * Q, Q);
        if (even < keys) {
          uint16_t last[2][256];  // an odd key, and one of zeros next to it
          memset(last, 0, sizeof last);
          memcpy(last[0], row(*k, b, kv, even), 2 * d);
          product<false>(last[0], 256, 2, packed, d / 2, scores + even * Q, Q);
        }
        F most[2] = {_mm512_set1_ps(-INFINITY), _mm512_set1_ps(-INFINITY)}, total[2] = {};
        for (int i = visible.begin; i < keys; i++)
          for (int h = 0; h < 2; h++) {
            F s = _mm512_load_ps(scores + i * Q + 16 * h);
            if (!visible.all(i)) _mm512_store_ps(scores + i * Q + 16 * h, s = _mm512_mask_blend_ps(visible.mask(i, h), _mm512_set1_ps(-INFINITY), s));
            most[h] = _mm512_max_ps(most[h], s);
          }
        for (int h = 0; h < 2; h++) {
          const F peak = _mm512_mul_ps(most[h], scale);
          for (int i = visible.begin; i < keys; i += 2) {
            const F a = exp2_(_mm512_fmsub_ps(_mm512_load_ps(scores + i * Q + 16 * h), scale, peak));
            const F c = i + 1 < keys ? exp2_(_mm512_fmsub_ps(_mm512_load_ps(scores + (i + 1) * Q + 16 * h), scale, peak)) : _mm512_setzero_ps();
            total[h] = _mm512_add_ps(total[h], _mm512_add_ps(a, c));
            _mm512_store_si512(weights + i / 2 * Q + 16 * h, pair(a, c));
          }
          most[h] = peak;
        }
        const int pairs = (keys + 1) / 2 - visible.begin / 2;
        product<false>(values + visible.begin, padded, d, weights + visible.begin / 2 * Q, pairs, sums_.as<float>(), Q);
        alignas(64) float sum[Q], peak[Q], inverse[Q] = {};
        for (int h = 0; h < 2; h++) _mm512_store_ps(sum + 16 * h, total[h]), _mm512_store_ps(peak + 16 * h, most[h]);
        for (int i = 0; i < count; i++) {
          inverse[i] = 1.f / sum[i];
          log_sums[((size_t)b * z.heads + head) * z.length + at + i] = peak[i] + std::log2(sum[i]);
        }
        unpack(sums_.as<float>(), inverse, (uint16_t*)packed, *out, b, head, at, count, d);
      }
  });
}

EXPORT void smolforge_attention_backward(const Sizes* sizes, const Tensor4* q, const Tensor4* k, const Tensor4* v, const int32_t* first,
                                             const Tensor4* out, const float* log_sums, const Tensor4* out_gradient,
                                             const Tensor4* q_gradient, const Tensor4* k_gradient, const Tensor4* v_gradient) {
  const Sizes z = *sizes;
  const int group = z.heads / z.kv_heads, padded = (z.length + Q - 1) / Q * Q + M, d = z.d;
  const float root = 1.f / std::sqrt((float)d);
  const F scale = _mm512_set1_ps(LOG2E * root);
  parallel_for(z.sequences * z.kv_heads, z.threads, [&](int item) {
    const int b = item / z.kv_heads, kv = item % z.kv_heads;
    const size_t unit = 2 * Q * d, all = (size_t)padded * d;
    Aligned memory(2 * all * 3 + 4 * all * 2 + 4 * unit + 4 * (size_t)padded / 2 * Q + 4 * d * Q);
    auto* keys_t = memory.as<uint16_t>();                     // K^T (d, padded)
    auto* keys = keys_t + all;                                // K and V with rows of zeros behind the last
    auto* values = keys + all;
    auto* k_sum = (float*)(values + all);                     // (padded, d)
    auto* v_sum = k_sum + all;
    auto* sums = v_sum + all;                                 // dQ^T (d, 32)
    auto* q_by_d = (uint32_t*)(sums + d * Q);
    auto *o_by_d = q_by_d + unit / 4, *q_by_q = o_by_d + unit / 4, *o_by_q = q_by_q + unit / 4;
    auto* pairs = o_by_q + unit / 4;                          // dscores (padded/2, 32)
    transpose(*k, b, kv, z.length, padded, d, keys_t);
    for (int p = 0; p < padded; p++)
      for (auto [to, t] : {std::pair{keys, k}, {values, v}})
        if (p < z.length) memcpy(to + (size_t)p * d, row(*t, b, kv, p), 2 * d);
        else memset(to + (size_t)p * d, 0, 2 * d);
    memset(k_sum, 0, 8 * all);
    for (int head = kv * group; head < (kv + 1) * group; head++)
      for (int at = 0; at < z.length; at += Q) {
        const int count = std::min(Q, z.length - at), end = at + count;
        const Visible visible(first ? first + (size_t)b * z.length + at : nullptr, at, count);
        pack_d(*q, b, head, at, count, d, q_by_d), pack_q(*q, b, head, at, count, d, q_by_q);
        pack_d(*out_gradient, b, head, at, count, d, o_by_d), pack_q(*out_gradient, b, head, at, count, d, o_by_q);
        alignas(64) float log_sum[Q], dot[Q], factor[Q];
        for (int i = 0; i < Q; i++) {
          log_sum[i] = INFINITY, dot[i] = 0, factor[i] = root;  // queries after the last have no weight
          if (i >= count) continue;
          log_sum[i] = log_sums[((size_t)b * z.heads + head) * z.length + at + i];
          const uint16_t *o = row(*out, b, head, at + i), *g = row(*out_gradient, b, head, at + i);
          F total = {};
          for (int c = 0; c < d; c += 16) {
            const auto load = [&](const uint16_t* p) { return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(p + c))), 16); };
            total = _mm512_fmadd_ps(load(o), load(g), total);
          }
          dot[i] = _mm512_reduce_add_ps(total);
        }
        int row_ = visible.begin;
        for (; row_ < end; row_ += M) {
          alignas(64) F score[M][2], by_weight[M][2];
          tile<M, false>(keys + (size_t)row_ * d, d, q_by_d, d / 2, (float*)score, Q);
          alignas(64) uint16_t weight[M][Q], by_score[M][Q];
          for (int m = 0; m < M; m++)
            for (int h = 0; h < 2; h++) {
              F w = exp2_(_mm512_fmsub_ps(score[m][h], scale, _mm512_load_ps(log_sum + 16 * h)));
              if (!visible.all(row_ + m)) w = _mm512_maskz_mov_ps(visible.mask(row_ + m, h), w);
              score[m][h] = w;
            }
          tile<M, false>(values + (size_t)row_ * d, d, o_by_d, d / 2, (float*)by_weight, Q);
          for (int m = 0; m < M; m++) {
            for (int h = 0; h < 2; h++) by_weight[m][h] = _mm512_mul_ps(score[m][h], _mm512_sub_ps(by_weight[m][h], _mm512_load_ps(dot + 16 * h)));
            _mm512_store_si512(weight[m], (I)_mm512_cvtne2ps_pbh(score[m][1], score[m][0]));
            _mm512_store_si512(by_score[m], (I)_mm512_cvtne2ps_pbh(by_weight[m][1], by_weight[m][0]));
            if (m % 2)
              for (int h = 0; h < 2; h++) _mm512_store_si512(pairs + (row_ + m) / 2 * Q + 16 * h, pair(by_weight[m - 1][h], by_weight[m][h]));
          }
          for (int c = 0; c < d; c += 32) {
            tile<M, true>(weight[0], Q, o_by_q + c / 32 * (Q / 2) * 32, Q / 2, v_sum + (size_t)row_ * d + c, d);
            tile<M, true>(by_score[0], Q, q_by_q + c / 32 * (Q / 2) * 32, Q / 2, k_sum + (size_t)row_ * d + c, d);
          }
        }
        product<false>(keys_t + visible.begin, padded, d, pairs + visible.begin / 2 * Q, (std::min(row_, padded) - visible.begin) / 2, sums, Q);
        unpack(sums, factor, (uint16_t*)q_by_d, *q_gradient, b, head, at, count, d);
      }
    for (int p = 0; p < z.length; p++)
      for (int c = 0; c < d; c += 16) {
        const auto put = [&](const Tensor4& to, F sum) { _mm256_storeu_si256((__m256i*)(row(to, b, kv, p) + c), (__m256i)_mm512_cvtneps_pbh(sum)); };
        put(*k_gradient, _mm512_mul_ps(_mm512_load_ps(k_sum + (size_t)p * d + c), _mm512_set1_ps(root)));
        put(*v_gradient, _mm512_load_ps(v_sum + (size_t)p * d + c));
      }
  });
}

#else
EXPORT int smolforge_attention_available() { return 0; }
#endif

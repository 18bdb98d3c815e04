// One step of a Llama on a CPU, the whole of it in one call: embedding, every layer, the head.
//
// A step runs a list of rows. A row is one token of one sequence at one position: a batch of streams that each
// want their next token, the tokens of a prompt, or both together. All rows meet each weight once.
//
// Everything heavy is one operation, `product`: rows times a matrix that was packed for it. A packed matrix is
// cut into units of 32 output rows, and inside a unit the inputs come first, so that one 64-byte vector holds the
// same few inputs of 16 outputs (two 32-byte vectors where that is what the machine has). One multiply-add against
// a broadcast input then feeds them all, nothing is ever summed across a vector, memory is read strictly forward. Keys and values are kept in the same layout, so
// attention is two more products: scores = keys x query, output = values x probabilities.
//
// Each output is accumulated in one order, from the first input to the last, whatever the number of rows or
// threads: a row's result is bitwise the same alone and in any company.
//
//   kind  unit layout                                       inputs
//   F32   [k][32] float                                     float
//   BF16  [k/2][32][2] bfloat16                             bfloat16 where the machine multiplies such pairs,
//                                                           else float; sums in fp32
//   I8    [k/4][32][4] value + 128; a scale per output      int8 with a scale per 64 inputs, widened to 16 bits
//                                                           where the machine does not multiply byte quads
//   I4    [k/8][32][4] bytes of two nibbles, value + 8;     int8 with a scale per 64 inputs
//         a scale per output and 32 or 64 inputs
//
// Only the dot products that have instructions of their own (bfloat16 pairs, byte quads) are spelled out.

#include <cmath>
#include <cstdlib>
#include <utility>

#include "threads.h"
#include "vectors.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512VNNI__)
constexpr int TILE = 12;        // rows of one tile, as many as the registers hold sums of
constexpr int SCALED_TILE = 8;  // and with scales, where groups are summed apart first
#else
constexpr int TILE = 3, SCALED_TILE = 3;
#endif
constexpr int UNIT = 32;           // outputs of one unit
constexpr int GROUP = 64;          // inputs that share one activation scale
constexpr int V = UNIT / LANES;    // vectors of one unit

typedef int16_t Shorts __attribute__((vector_size(WIDTH)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));

enum Kind { F32, BF16, I8, I4 };

// Does the machine multiply bfloat16 pairs and byte quads?
#if defined(__AVX512BF16__)
constexpr bool BF16_PAIRS = true;
#else
constexpr bool BF16_PAIRS = false;
#endif
#if defined(__AVX512VNNI__)
constexpr bool QUADS = true;
#else
constexpr bool QUADS = false;
#endif

#if defined(__AVX512BF16__)
// acc + the dot products of pairs of bfloat16 with one broadcast pair.
inline F dot_pairs(F acc, I w, const void* x) {
  return (F)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)splat(load<int32_t>(x)));
}
#else
// The same with two floats: a bfloat16 is the upper half of one.
inline F dot_pairs(F acc, I w, const void* x) {
  acc += (F)((U)w << 16) * load<float>(x);
  return acc + (F)(w & (int32_t)0xffff0000) * load<float>((const float*)x + 1);
}
#endif

// acc + the dot products of quads of unsigned bytes with one broadcast quad of signed ones; exact.
#if defined(__AVX512VNNI__)
inline I dot_quads(I acc, I w, const void* x) {
  return (I)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)splat(load<int32_t>(x)));
}
#else
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

// Where there are no byte quads, the same for 32 inputs of 4-bit weights, whose products are small: at most
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

int round_up(int n, int to) { return (n + to - 1) / to * to; }

}  // namespace

extern "C" {
struct Matrix {        // as packed by native.py
  int32_t kind, n, k;  // outputs and inputs, before padding
  int32_t group;       // I4: inputs that share a weight scale
  const uint8_t* data;
  const void* scales;  // I8: float [units][32]; I4: bfloat16 [units][k / group][32]
};
struct Layer { Matrix qkv, o, gate_up, down; const float *norm1, *norm2; };
struct Shape { int32_t layers, width, heads, kv_heads, head_dim, inner, vocab, cache_kind; float eps; };
}

namespace {

int bytes_per_input(int kind) { return kind == F32 ? 4 : kind == BF16 ? 2 : 1; }  // of a weight; I4: half of it
constexpr int input_bytes(int kind) {
  return kind == F32 ? 4 : kind == BF16 ? (BF16_PAIRS ? 2 : 4) : kind == I8 && !QUADS ? 2 : 1;
}
size_t unit_bytes(const Matrix& w) {
  const size_t k = round_up(w.k, GROUP);
  return w.kind == I4 ? k * UNIT / 2 : k * UNIT * bytes_per_input(w.kind);
}

// Rows of inputs in the form that a kind of matrix wants (input_bytes each). `stride` counts inputs.
struct Inputs {
  void* data;
  int stride;
  float* scales;         // I8, I4: [row][stride / GROUP]
  int32_t* corrections;  // -(offset of the stored weights) * (sum of the group's inputs)
};

// Small weights are asked for 1 KiB ahead: the processor's own prefetcher, which is best left alone with larger ones,
// does not keep up with them (one row, two Zen 3 cores: int8 1.14 times, int4 1.2 times).
inline void ask_ahead(const uint8_t* p) {
  for (int at = 0; at < 4 * UNIT; at += 64) __builtin_prefetch(p + 1024 + at);
}

// f(m, v) for all rows and vectors of a tile, unrolled, in the order that keeps the fewest operands alive beside the sums:
// with many registers the vectors of weights, with few the inputs of the rows.
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
    const int groups = in.stride / GROUP, step = KIND == I4 ? w.group : GROUP;
    const uint16_t* fine = KIND == I4 ? (const uint16_t*)w.scales + (size_t)unit * (round_up(k, GROUP) / step) * UNIT : nullptr;
    F total[M][V] = {};
    for (int g = 0; g < k; g += step) {
      I acc[M][V];
      each<M>([&](int m, int v) { acc[m][v] = splat(in.corrections[(size_t)(row + m) * (in.stride / step) + g / step]); });
      if constexpr (KIND == I8) {
        for (int i = g; i < g + GROUP; i += 4, p += 4 * UNIT) {
          ask_ahead(p);
          each<M>([&](int m, int v) { acc[m][v] = dot_quads(acc[m][v], word(v), input(m, i)); });
        }
      } else {
        const auto low = [&](int v) { return word(v) & 0x0f0f0f0f; };
        const auto high = [&](int v) { return (I)((U)word(v) >> 4) & 0x0f0f0f0f; };
        for (int half = g; half < g + step; half += 32) {
          Small small[M][V] = {};
          for (int i = half; i < half + 32; i += 8, p += 4 * UNIT) {
            ask_ahead(p);
            each<M>([&](int m, int v) {
              const int8_t* x = input(m, i);
              if constexpr (QUADS) acc[m][v] = dot_quads(dot_quads(acc[m][v], low(v), x), high(v), x + 4);
              else small[m][v] = dot_small(dot_small(small[m][v], low(v), x), high(v), x + 4);
            });
          }
          if constexpr (!QUADS) each<M>([&](int m, int v) { acc[m][v] += widen(small[m][v]); });
        }
      }
      const auto scale = [&](int v) {
        if constexpr (KIND == I4) return from_bf16(load<Halves>(fine + v * LANES));
        else return splat(1.f);
      };
      each<M>([&](int m, int v) {
        total[m][v] += __builtin_convertvector(acc[m][v], F) * (scale(v) * in.scales[(size_t)(row + m) * groups + g / GROUP]);
      });
      fine += KIND == I4 ? UNIT : 0;
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
       : kind == I8  ? pick<I8>(rows, all)  : pick<I4>(rows, all);
}

// rows x w for the units first..last; each tile goes to done(unit, row, rows, out).
template <class Done>
void product(const Matrix& w, size_t bytes, int k, const Inputs& in, int rows, int first, int last, Done done) {
  alignas(64) F out[TILE][V];
  const int most = w.kind == I8 || w.kind == I4 ? SCALED_TILE : TILE;
  for (int unit = first; unit < last; unit++)
    for (int row = 0; row < rows; row += most) {
      const int n = std::min(most, rows - row);
      pick(w.kind, n)(w, unit, bytes, k, in, row, out);
      done(unit, row, n, out);
    }
}

// The threads of one step, which spin, then yield, where they wait for each other.
struct Team {
  explicit Team(int n) : most(n) {}
  // f(id) on every thread; there may be fewer than asked for, `size` says how many.
  template <class Job> void run(const Job& f) {
    together(most, [this, &f](int id, int count) {
      size.store(count, std::memory_order_relaxed);  // all say the same
      f(id);
    });
  }
  void barrier() {
    if (size == 1) return;
    const unsigned mine = phase.load(std::memory_order_acquire);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
      arrived.store(0, std::memory_order_relaxed);
      phase.store(mine + 1, std::memory_order_release);
      return;
    }
    // A core that is busy elsewhere must not be kept from our own thread by our own spinning.
    for (int spins = 0; phase.load(std::memory_order_acquire) == mine; spins++) {
      if (spins > 4000) std::this_thread::yield();
#if defined(__x86_64__)
      else _mm_pause();
#endif
    }
  }
  const int most;
  std::atomic<int> size{1};

 private:
  std::atomic<int> arrived{0};
  std::atomic<unsigned> phase{0};
};

// 64-byte aligned memory that grows and never shrinks; zeroed, so that padding is 0.
struct Buffer {
  char* p = nullptr;
  size_t size = 0;
  ~Buffer() { free(p); }
  template <class T> T* get(size_t n) {
    const size_t need = (n * sizeof(T) + 63) / 64 * 64;
    if (need > size) {
      free(p);
      p = (char*)aligned_alloc(64, need);
      memset(p, 0, need);
      size = need;
    }
    return (T*)p;
  }
};

// Inputs i.. of a row for F32 or BF16 matrices; and one of them.
void put_inputs(int kind, char* row, int i, F v) {
  if (kind == F32 || !BF16_PAIRS) store((float*)row + i, v);
  else store((uint16_t*)row + i, to_bf16(v));
}
void put_input(int kind, char* row, int i, float v) {
  if (kind == F32 || !BF16_PAIRS) ((float*)row)[i] = v;
  else ((uint16_t*)row)[i] = to_bf16(v);
}

struct Prepared { Buffer data, scales, corrections; };

struct Span { int first, last; };
Span share(int n, int id, int of) { return {(int)((int64_t)n * id / of), (int)((int64_t)n * (id + 1) / of)}; }

struct Model {
  Shape s;
  std::vector<Layer> layers;
  Matrix embedding, head;
  const float *final_norm, *cos, *sin;  // cos, sin: [position][head_dim / 2]
  Team team;
  Buffer x, qkv, y, h;                  // residual stream, q|k|v, attention's output, SwiGLU's output: float rows
  Buffer queries;                       // rotated and scaled, as the cache's kind wants its inputs
  Prepared shared;                      // prepared inputs of all rows
  std::vector<Prepared> own;            // the same for one row, one per thread: cheaper than a barrier
  std::vector<Buffer> scores, weights;  // of attention, one per thread
  std::atomic<int> next{0};
  int width_, q_, inner_;               // row strides, padded

  Model(const Shape& s, int threads) : s(s), team(threads), own(threads), scores(threads), weights(threads) {
    width_ = round_up(s.width, GROUP);
    q_ = round_up((s.heads + 2 * s.kv_heads) * s.head_dim, GROUP);
    inner_ = round_up(s.inner, GROUP);
  }

  // Bring row `r` of `from` (k floats) into the form that `w` wants, normed where `norm` is given.
  void prepare_row(const Matrix& w, const Inputs& to, int r, const float* from, const float* norm) const {
    const int k = to.stride;
    F scale = splat(1.f);
    if (norm) {
      F squares = {};
      for (int i = 0; i < k; i += LANES) { const F v = load<F>(from + i); squares += v * v; }
      scale = splat(1.f / std::sqrt(sum(squares) / s.width + s.eps));
    }
    const auto value = [&](int i) { F v = load<F>(from + i); return norm ? v * scale * load<F>(norm + i) : v; };
    char* row = (char*)to.data + (size_t)r * k * input_bytes(w.kind);
    if (w.kind == F32 || w.kind == BF16) {
      for (int i = 0; i < k; i += LANES) put_inputs(w.kind, row, i, value(i));
      return;
    }
    const int step = w.kind == I4 ? w.group : GROUP, offset = w.kind == I4 ? 8 : 128;
    for (int g = 0; g < k; g += GROUP) {
      F v[GROUP / LANES], most = {};
      for (int j = 0; j < GROUP / LANES; j++) {
        v[j] = value(g + LANES * j);
        const F a = v[j] < 0 ? -v[j] : v[j];
        most = a > most ? a : most;
      }
      const float peak = greatest(most), inverse = peak > 0 ? 127.f / peak : 0.f;
      to.scales[(size_t)r * (k / GROUP) + g / GROUP] = peak / 127.f;
      int8_t q[GROUP];
      for (int j = 0; j < GROUP / LANES; j++) {
        const F magic = splat(12582912.f);
        store(q + LANES * j, __builtin_convertvector(__builtin_convertvector((v[j] * inverse + magic) - magic, I), Bytes));
      }
      if (input_bytes(w.kind) == 1) memcpy(row + g, q, GROUP);
      else  // the order that dot_quads wants
        for (int i = 0; i < GROUP; i++) ((int16_t*)row)[g + i / 4 * 4 + "\0\2\1\3"[i % 4]] = q[i];
      for (int j = 0; j < GROUP / step; j++) {
        int32_t total = 0;
        for (int i = 0; i < step; i++) total += q[j * step + i];
        to.corrections[(size_t)r * (k / step) + g / step + j] = -offset * total;
      }
    }
  }

  // Inputs for `w` from float rows. With one row each thread makes its own; with more they share the work.
  Inputs prepare(const Matrix& w, int id, int rows, const float* from, int stride, const float* norm, const int32_t* pick = nullptr) {
    Prepared& p = rows == 1 ? own[id] : shared;
    const Inputs to = inputs_of(p, rows, stride);
    const Span mine = rows == 1 ? Span{0, 1} : share(rows, id, team.size);
    for (int r = mine.first; r < mine.last; r++)
      prepare_row(w, to, r, from + (size_t)(pick ? pick[r] : r) * stride, norm);
    if (rows > 1) team.barrier();
    return to;
  }
  Inputs inputs_of(Prepared& p, int rows, int stride) {
    return {p.data.get<float>((size_t)rows * stride), stride, p.scales.get<float>((size_t)rows * stride / GROUP),
            p.corrections.get<int32_t>((size_t)rows * stride / UNIT)};
  }

  template <class Done> void rows_times(const Matrix& w, const Inputs& in, int id, int rows, Done done) {
    const Span mine = share((w.n + UNIT - 1) / UNIT, id, team.size);
    product(w, unit_bytes(w), in.stride, in, rows, mine.first, mine.last, done);
  }

  void embed(int token, float* to) const {
    const Matrix& w = embedding;
    const int lane = token % UNIT, unit = token / UNIT;
    const uint8_t* p = w.data + unit_bytes(w) * unit;
    for (int i = 0; i < w.k; i++) {
      if (w.kind == F32) to[i] = load<float>(p + ((size_t)i * UNIT + lane) * 4);
      else if (w.kind == BF16) to[i] = from_bf16(load<uint16_t>(p + ((size_t)(i / 2) * UNIT + lane) * 4 + i % 2 * 2));
      else to[i] = (p[((size_t)(i / 4) * UNIT + lane) * 4 + i % 4] - 128) * ((const float*)w.scales)[unit * UNIT + lane];
    }
  }

  // Where a sequence's cache keeps a layer's keys [unit of 32 positions] and values [unit of 32 columns].
  Matrix keys(uint8_t* cache, int capacity, int layer, int kv) const {
    const size_t e = bytes_per_input(s.cache_kind), per = e * capacity * s.head_dim;
    return {s.cache_kind, capacity, s.head_dim, 0, cache + per * ((size_t)layer * s.kv_heads + kv), nullptr};
  }
  Matrix values(uint8_t* cache, int capacity, int layer, int kv) const {
    const size_t e = bytes_per_input(s.cache_kind), columns = round_up(s.head_dim, UNIT);
    uint8_t* base = cache + e * capacity * s.head_dim * s.layers * s.kv_heads;
    return {s.cache_kind, s.head_dim, capacity, 0, base + e * capacity * columns * ((size_t)layer * s.kv_heads + kv), nullptr};
  }
  void put(const Matrix& m, size_t bytes, int output, int input, float value) const {
    uint8_t* p = (uint8_t*)m.data + bytes * (output / UNIT);
    const int lane = output % UNIT;
    if (m.kind == F32) store(p + ((size_t)input * UNIT + lane) * 4, value);
    else store(p + ((size_t)(input / 2) * UNIT + lane) * 4 + input % 2 * 2, to_bf16(value));
  }
  // Rotate row r's query head (or key head, which goes to the cache with its value); half-rotation layout.
  void rotate(int r, int head, int position, uint8_t* cache, int capacity, int layer) {
    const int d = s.head_dim, half = d / 2;
    const float* from = (const float*)qkv.p + (size_t)r * q_ + (size_t)head * d;
    const float *c = cos + (size_t)position * half, *n = sin + (size_t)position * half;
    if (head < s.heads) {
      const float scale = LOG2E / std::sqrt((float)d);  // softmax is taken in powers of two
      const int at = (r * s.heads + head) * d;
      for (int i = 0; i < half; i++) {
        put_input(s.cache_kind, queries.p, at + i, (from[i] * c[i] - from[i + half] * n[i]) * scale);
        put_input(s.cache_kind, queries.p, at + i + half, (from[i + half] * c[i] + from[i] * n[i]) * scale);
      }
      return;
    }
    const int kv = head - s.heads;
    const size_t e = bytes_per_input(s.cache_kind);
    const Matrix k = keys(cache, capacity, layer, kv), v = values(cache, capacity, layer, kv);
    const size_t kb = e * UNIT * d, vb = e * UNIT * capacity;
    for (int i = 0; i < half; i++) {
      put(k, kb, position, i, from[i] * c[i] - from[i + half] * n[i]);
      put(k, kb, position, i + half, from[i + half] * c[i] + from[i] * n[i]);
    }
    for (int i = 0; i < d; i++) put(v, vb, i, position, from[(size_t)s.kv_heads * d + i]);
  }

  // Attention of `n` query vectors (rows of one head, or heads of one row) over one key/value head.
  void attend(int id, int row, int n_rows, int head, int n_heads, int position, uint8_t* cache, int capacity, int layer) {
    const int d = s.head_dim, n = n_rows * n_heads, seen = position + n_rows, padded = round_up(seen, UNIT);
    const int kv = head / (s.heads / s.kv_heads);
    const size_t e = bytes_per_input(s.cache_kind);
    const Matrix k = keys(cache, capacity, layer, kv), v = values(cache, capacity, layer, kv);
    float* score = scores[id].get<float>((size_t)n * padded);
    const int in = input_bytes(s.cache_kind);
    char* weight = weights[id].get<char>((size_t)n * padded * in);
    const Inputs q = {queries.p + in * ((size_t)row * s.heads + head) * d, n_heads > 1 ? d : s.heads * d, nullptr, nullptr};
    product(k, e * UNIT * d, d, q, n, 0, padded / UNIT, [&](int unit, int m, int count, F(*out)[V]) {
      for (int i = 0; i < count; i++) memcpy(score + (size_t)(m + i) * padded + unit * UNIT, out[i], 4 * UNIT);
    });
    float inverse[TILE];
    for (int i = 0; i < n; i++) {
      float* t = score + (size_t)i * padded;
      const int length = position + 1 + (n_heads > 1 ? 0 : i);
      for (int j = length; j < padded; j++) t[j] = -INFINITY;
      F most = splat(-INFINITY), total = {};
      for (int j = 0; j < padded; j += LANES) { const F a = load<F>(t + j); most = a > most ? a : most; }
      const F peak = splat(greatest(most));
      for (int j = 0; j < padded; j += LANES) {
        const F a = load<F>(t + j);
        const F p = a == -INFINITY ? F{} : exp2_(a - peak);
        total += p;
        put_inputs(s.cache_kind, weight + (size_t)i * padded * in, j, p);
      }
      inverse[i] = 1.f / sum(total);
    }
    const Inputs w = {weight, padded, nullptr, nullptr};
    product(v, e * UNIT * capacity, round_up(seen, 2), w, n, 0, (d + UNIT - 1) / UNIT, [&](int unit, int m, int count, F(*out)[V]) {
      for (int i = 0; i < count; i++) {
        const int r = n_heads > 1 ? row : row + m + i, h_ = n_heads > 1 ? head + m + i : head;
        float* to = (float*)y.p + (size_t)r * y_stride() + (size_t)h_ * d + unit * UNIT;
        float all[UNIT];
        for (int v = 0; v < V; v++) store(all + v * LANES, out[i][v] * inverse[m + i]);
        memcpy(to, all, sizeof(float) * std::min(UNIT, d - unit * UNIT));
      }
    });
  }
  int y_stride() const { return round_up(s.heads * s.head_dim, GROUP); }

  void step(int rows, const int32_t* tokens, const int32_t* positions, uint8_t* const* caches, const int32_t* capacities,
            int wanted, const int32_t* wanted_rows, float* logits) {
    const int per_kv = s.heads / s.kv_heads, all_heads = s.heads + s.kv_heads;
    float* stream = x.get<float>((size_t)rows * width_);
    float* mixed = y.get<float>((size_t)rows * y_stride());
    float* projected = qkv.get<float>((size_t)rows * q_);
    float* hidden = h.get<float>((size_t)rows * inner_);
    queries.get<float>((size_t)rows * s.heads * s.head_dim);
    inputs_of(shared, std::max(rows, wanted), std::max({width_, inner_, y_stride()}));
    // Rows of one sequence that follow each other share their reading of its keys: blocks of at most TILE rows.
    std::vector<Span> blocks;
    for (int r = 0; r < rows; r++) {
      const bool follows = !blocks.empty() && r - blocks.back().first < TILE && caches[r] == caches[r - 1] && positions[r] == positions[r - 1] + 1;
      if (follows) blocks.back().last = r + 1;
      else blocks.push_back({r, r + 1});
    }
    const auto job = [&](int id) {
      const Span mine = share(rows, id, team.size);
      for (int r = mine.first; r < mine.last; r++) embed(tokens[r], stream + (size_t)r * width_);
      team.barrier();
      const auto add = [&](int unit, int m, int n, F(*out)[V]) {
        for (int i = 0; i < n; i++) {
          float* to = stream + (size_t)(m + i) * width_ + unit * UNIT;
          for (int v = 0; v < V; v++) store(to + v * LANES, load<F>(to + v * LANES) + out[i][v]);
        }
      };
      for (int l = 0; l < s.layers; l++) {
        const Layer& layer = layers[l];
        rows_times(layer.qkv, prepare(layer.qkv, id, rows, stream, width_, layer.norm1), id, rows, [&](int unit, int m, int n, F(*out)[V]) {
          for (int i = 0; i < n; i++) memcpy(projected + (size_t)(m + i) * q_ + unit * UNIT, out[i], 4 * UNIT);
        });
        team.barrier();
        if (id == 0) next.store(0, std::memory_order_relaxed);
        const Span turns = share(rows * all_heads, id, team.size);
        for (int i = turns.first; i < turns.last; i++) {
          const int r = i / all_heads;
          rotate(r, i % all_heads, positions[r], caches[r], capacities[r], l);
        }
        team.barrier();
        if (rows == 1) {  // the heads are shared out evenly, even where that splits the heads of one key/value head
          const Span heads = share(s.heads, id, team.size);
          for (int a = heads.first, b; a < heads.last; a = b) {
            b = std::min({heads.last, (a / per_kv + 1) * per_kv, a + TILE});
            attend(id, 0, 1, a, b - a, positions[0], caches[0], capacities[0], l);
          }
        } else {  // later blocks see more keys: take them in turns, the longest first
          const int items = (int)blocks.size() * s.heads;
          for (int i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) {
            const Span b = blocks[blocks.size() - 1 - i / s.heads];
            const int head = i % s.heads, n = b.last - b.first;
            if (n > 1) attend(id, b.first, n, head, 1, positions[b.first], caches[b.first], capacities[b.first], l);
            else if (head % per_kv % TILE == 0)
              attend(id, b.first, 1, head, std::min(TILE, per_kv - head % per_kv), positions[b.first], caches[b.first], capacities[b.first], l);
          }
        }
        team.barrier();
        rows_times(layer.o, prepare(layer.o, id, rows, mixed, y_stride(), nullptr), id, rows, add);
        team.barrier();
        rows_times(layer.gate_up, prepare(layer.gate_up, id, rows, stream, width_, layer.norm2), id, rows, [&](int unit, int m, int n, F(*out)[V]) {
          for (int i = 0; i < n; i++) for (int v = 0; v < V / 2; v++) {  // a unit holds 16 gates and their 16 ups
            const F gate = out[i][v], silu = gate / (1.f + exp2_(gate < -80.f ? splat(80.f * LOG2E) : gate * -LOG2E));
            store(hidden + (size_t)(m + i) * inner_ + unit * 16 + v * LANES, silu * out[i][v + V / 2]);
          }
        });
        team.barrier();
        rows_times(layer.down, prepare(layer.down, id, rows, hidden, inner_, nullptr), id, rows, add);
        team.barrier();
      }
      if (!wanted) return;
      rows_times(head, prepare(head, id, wanted, stream, width_, final_norm, wanted_rows), id, wanted, [&](int unit, int m, int n, F(*out)[V]) {
        const int width = std::min(UNIT, s.vocab - unit * UNIT);
        for (int i = 0; i < n; i++) memcpy(logits + (size_t)(m + i) * s.vocab + unit * UNIT, out[i], sizeof(float) * width);
      });
    };
    team.run(job);
  }
};

}  // namespace

extern "C" {
// Pointers must outlive the model; norms and rows are padded to a multiple of 64 with zeros.
void* smolforge_open(const Shape* shape, const Layer* layers, const Matrix* embedding, const Matrix* head,
                     const float* final_norm, const float* cos, const float* sin, int threads) {
  auto* m = new Model(*shape, threads);
  m->layers.assign(layers, layers + shape->layers);
  m->embedding = *embedding, m->head = *head;
  m->final_norm = final_norm, m->cos = cos, m->sin = sin;
  return m;
}
void smolforge_close(void* model) { delete (Model*)model; }
void smolforge_step(void* model, int rows, const int32_t* tokens, const int32_t* positions, uint8_t* const* caches,
                    const int32_t* capacities, int wanted, const int32_t* wanted_rows, float* logits) {
  ((Model*)model)->step(rows, tokens, positions, caches, capacities, wanted, wanted_rows, logits);
}
}

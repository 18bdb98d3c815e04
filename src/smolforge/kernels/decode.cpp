// One step of a Llama on a CPU in one call: embedding, every layer, the head.
//
// A step runs a list of rows. A row is one token of one sequence at one position: a batch of streams that each need their
// next token, the tokens of a prompt, or both together. All rows use each weight once, while it is in the cache. Keys and
// values are kept in the layout of weights, so attention is two more products: scores = keys x query, output = values x
// probabilities.

#include <cmath>

#include "matmul.h"
#include "memory.h"
#include "threads.h"

extern "C" {
// q_norm, k_norm: weights of the norms of query and key heads, or null. rotates: 0 where the layer sees no positions.
struct Layer { Matrix qkv, o, gate_up, down; const float *norm1, *norm2, *q_norm, *k_norm; int32_t rotates; };
struct Shape { int32_t layers, width, heads, kv_heads, head_dim, inner, vocab, cache_kind; float eps; };
}

namespace {

typedef int8_t Bytes __attribute__((vector_size(LANES)));

// Inputs i.. of a row for F32 or BF16 matrices; and one of them.
void put_inputs(int kind, char* row, int i, F v) {
  if (kind == F32 || !BF16_PAIRS) store((float*)row + i, v);
  else store((uint16_t*)row + i, to_bf16(v));
}
void put_input(int kind, char* row, int i, float v) {
  if (kind == F32 || !BF16_PAIRS) ((float*)row)[i] = v;
  else ((uint16_t*)row)[i] = to_bf16(v);
}

struct Prepared { Buffer data, scales, corrections, sums; };

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
  std::vector<float> still;             // cosines and sines of no rotation

  Model(const Shape& s, int threads) : s(s), team(threads), own(threads), scores(threads), weights(threads) {
    width_ = round_up(s.width, GROUP);
    q_ = round_up((s.heads + 2 * s.kv_heads) * s.head_dim, GROUP);
    inner_ = round_up(s.inner, GROUP);
    still.assign(s.head_dim, 0.f);
    std::fill(still.begin(), still.begin() + s.head_dim / 2, 1.f);
  }

  // Bring row `r` of `from` (k floats) into the form that `w` needs, normed where `norm` is given.
  void prepare_row(const Matrix& w, const Inputs& to, int r, const float* from, const float* norm) const {
    const int k = to.stride;
    F scale = splat(1.f);
    if (norm) {
      F squares = {};
      for (int i = 0; i < k; i += LANES) { const F v = load<F>(from + i); squares += v * v; }
      scale = splat(1.f / std::sqrt(sum(squares) / s.width + s.eps));
    }
    const auto value = [&](int i) { F v = load<F>(from + i); return norm ? v * scale * load<F>(norm + i) : v; };
    const int parts = planes(w.kind);
    const auto row = [&](int p) { return (char*)to.data + ((size_t)r * parts + p) * k * input_bytes(w.kind); };
    if (w.kind == F32 || w.kind == BF16) {
      for (int i = 0; i < k; i += LANES) put_inputs(w.kind, row(0), i, value(i));
      return;
    }
    const int step = w.kind == I8 ? GROUP : BLOCK;
    for (int g = 0; g < k; g += GROUP) {
      F v[GROUP / LANES];
      for (int j = 0; j < GROUP / LANES; j++) v[j] = value(g + LANES * j);
      for (int p = 0; p < parts; p++) quantize(v, w.kind, step, to, (size_t)r * parts + p, g, row(p));
    }
  }
  // Round the 64 inputs `v` from g on to 8 bits, as row `r` of inputs; what that leaves stays in `v`.
  static void quantize(F* v, int kind, int step, const Inputs& to, size_t r, int g, char* row) {
    const int k = to.stride;
    F most = {};
    for (int j = 0; j < GROUP / LANES; j++) {
      const F a = v[j] < 0 ? -v[j] : v[j];
      most = a > most ? a : most;
    }
    const float peak = greatest(most), inverse = peak > 0 ? 127.f / peak : 0.f, scale = peak / 127.f;
    to.scales[r * (k / GROUP) + g / GROUP] = scale;
    int8_t q[GROUP];
    for (int j = 0; j < GROUP / LANES; j++) {
      const F magic = splat(12582912.f), whole = (v[j] * inverse + magic) - magic;
      store(q + LANES * j, __builtin_convertvector(__builtin_convertvector(whole, I), Bytes));
      v[j] -= whole * scale;
    }
    if (input_bytes(kind) == 1) memcpy(row + g, q, GROUP);
    else  // the order that dot_quads needs
      for (int i = 0; i < GROUP; i++) ((int16_t*)row)[g + i / 4 * 4 + "\0\2\1\3"[i % 4]] = q[i];
    for (int j = 0; j < GROUP / step; j++) {
      int32_t total = 0;
      for (int i = 0; i < step; i++) total += q[j * step + i];
      to.corrections[r * (k / step) + g / step + j] = -I8_OFFSET * total;
      to.sums[r * (k / step) + g / step + j] = scale * total;
    }
  }

  // Inputs for `w` from float rows. One row is prepared by every thread for itself; more are shared out.
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
    return {p.data.get<float>((size_t)rows * stride), stride, p.scales.get<float>((size_t)rows * 2 * stride / GROUP),
            p.corrections.get<int32_t>((size_t)rows * 2 * stride / BLOCK), p.sums.get<float>((size_t)rows * 2 * stride / BLOCK)};
  }

  template <class Done> void rows_times(const Matrix& w, const Inputs& in, int id, int rows, Done done) {
    const Span mine = share((w.n + UNIT - 1) / UNIT, id, team.size);
    const int parts = planes(w.kind);
    product(w, unit_bytes(w), in.stride, in, rows * parts, mine.first, mine.last, [&](int unit, int m, int n, F(*out)[V]) {
      m /= parts, n /= parts;
      for (int i = 0; parts > 1 && i < n; i++)
        for (int v = 0; v < V; v++) out[i][v] = out[2 * i][v] + out[2 * i + 1][v];
      for (int i = 0; w.bias && i < n; i++)
        for (int v = 0; v < V; v++) out[i][v] += load<F>(w.bias + unit * UNIT + v * LANES);
      done(unit, m, n, out);
    });
  }

  void embed(int token, float* to) const {
    const Matrix& w = embedding;
    const int lane = token % UNIT, unit = token / UNIT;
    const uint8_t* p = w.data + unit_bytes(w) * unit;
    for (int i = 0; i < w.k; i++) {
      if (w.kind == F32) to[i] = load<float>(p + ((size_t)i * UNIT + lane) * 4);
      else if (w.kind == BF16) to[i] = from_bf16(load<uint16_t>(p + ((size_t)(i / 2) * UNIT + lane) * 4 + i % 2 * 2));
      else {  // I8, B8 or nibbles
        const size_t word = (size_t)(is_nibbles(w.kind) ? i / 8 : i / 4) * UNIT + lane, group = (size_t)unit * (round_up(w.k, GROUP) / BLOCK) + i / BLOCK;
        const int byte = p[word * 4 + i % 4];
        const auto fine = [&](size_t at) { return from_f16(((const uint16_t*)w.scales)[at * UNIT + lane]); };
        to[i] = w.kind == I8   ? (byte - 128) * ((const float*)w.scales)[unit * UNIT + lane]
                : w.kind == B8 ? (byte - 128) * fine(group)
                               : (i % 8 < 4 ? byte & 15 : byte >> 4) * fine(2 * group) + fine(2 * group + 1);
      }
    }
  }

  // A layer's keys [unit of 32 positions] and values [unit of 32 columns] in the cache of a sequence.
  Matrix keys(uint8_t* cache, int capacity, int layer, int kv) const {
    const size_t e = bytes_per_input(s.cache_kind), per = e * capacity * s.head_dim;
    return {s.cache_kind, capacity, s.head_dim, cache + per * ((size_t)layer * s.kv_heads + kv), nullptr, nullptr};
  }
  Matrix values(uint8_t* cache, int capacity, int layer, int kv) const {
    const size_t e = bytes_per_input(s.cache_kind), columns = round_up(s.head_dim, UNIT);
    uint8_t* base = cache + e * capacity * s.head_dim * s.layers * s.kv_heads;
    return {s.cache_kind, s.head_dim, capacity, base + e * capacity * columns * ((size_t)layer * s.kv_heads + kv), nullptr, nullptr};
  }
  void put(const Matrix& m, size_t bytes, int output, int input, float value) const {
    uint8_t* p = (uint8_t*)m.data + bytes * (output / UNIT);
    const int lane = output % UNIT;
    if (m.kind == F32) store(p + ((size_t)input * UNIT + lane) * 4, value);
    else store(p + ((size_t)(input / 2) * UNIT + lane) * 4 + input % 2 * 2, to_bf16(value));
  }
  // Rotate a query head of row r, or a key head, which is written to the cache with its value; half-rotation layout.
  void rotate(int r, int head, int position, uint8_t* cache, int capacity, int layer) {
    const int d = s.head_dim, half = d / 2;
    float* from = (float*)qkv.p + (size_t)r * q_ + (size_t)head * d;
    const float *c = cos + (size_t)position * half, *n = sin + (size_t)position * half;
    const float* norm = head < s.heads ? layers[layer].q_norm : layers[layer].k_norm;
    if (norm) {
      float squares = 0;
      for (int i = 0; i < d; i++) squares += from[i] * from[i];
      const float scale = 1.f / std::sqrt(squares / d + s.eps);
      for (int i = 0; i < d; i++) from[i] *= scale * norm[i];
    }
    if (!layers[layer].rotates) c = still.data(), n = still.data() + half;
    if (head < s.heads) {
      const float scale = LOG2E / std::sqrt((float)d);  // softmax uses powers of two
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
    const Inputs q = {queries.p + in * ((size_t)row * s.heads + head) * d, n_heads > 1 ? d : s.heads * d, nullptr, nullptr, nullptr};
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
    const Inputs w = {weight, padded, nullptr, nullptr, nullptr};
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
    // Consecutive rows of one sequence read its keys together: blocks of at most TILE rows.
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
        const Span heads = share(rows * all_heads, id, team.size);
        for (int i = heads.first; i < heads.last; i++) {
          const int r = i / all_heads;
          rotate(r, i % all_heads, positions[r], caches[r], capacities[r], l);
        }
        team.barrier();
        if (rows == 1) {  // heads are shared out evenly, even if that splits the heads of one key/value head
          const Span heads = share(s.heads, id, team.size);
          for (int a = heads.first, b; a < heads.last; a = b) {
            b = std::min({heads.last, (a / per_kv + 1) * per_kv, a + TILE});
            attend(id, 0, 1, a, b - a, positions[0], caches[0], capacities[0], l);
          }
        } else {  // later blocks see more keys: threads take the next block, the longest first
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

// Pointers must outlive the model; norms and rows are padded to a multiple of 64 with zeros.
EXPORT void* smolforge_open(const Shape* shape, const Layer* layers, const Matrix* embedding, const Matrix* head,
                     const float* final_norm, const float* cos, const float* sin, int threads) {
  auto* m = new Model(*shape, threads);
  m->layers.assign(layers, layers + shape->layers);
  m->embedding = *embedding, m->head = *head;
  m->final_norm = final_norm, m->cos = cos, m->sin = sin;
  return m;
}
EXPORT void smolforge_close(void* model) { delete (Model*)model; }
EXPORT void smolforge_step(void* model, int rows, const int32_t* tokens, const int32_t* positions, uint8_t* const* caches,
                    const int32_t* capacities, int wanted, const int32_t* wanted_rows, float* logits) {
  ((Model*)model)->step(rows, tokens, positions, caches, capacities, wanted, wanted_rows, logits);
}

// Runs a library of kernels, here or under an emulator, and compares what it computes with plain loops in double.
//
//   check LIBRARY     prints one line per check; the exit status is the number of checks that fail
//
// The library is a file as the wheel holds it. Attention is compared in Python (tests/model/test_native_attention.py):
// only processors that run here have it.

#include <dlfcn.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "layout.h"

namespace {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

struct Layer { Matrix qkv, o, gate_up, down; const float *norm1, *norm2, *q_norm, *k_norm; int32_t rotates; };
struct Shape { int32_t layers, width, heads, kv_heads, head_dim, inner, vocab, cache_kind; float eps; };

// Widths that are whole units and widths that are not.
constexpr int LAYERS = 2, WIDTH = 72, HEADS = 6, KV = 2, D = 12, INNER = 100, VOCAB = 99, TOKENS = 40, CAPACITY = 64;
constexpr int THREADS = 2;

void* library;
int failures = 0;

template <class Function> Function* find(const char* name) {
  void* found = dlsym(library, name);
  if (!found) { fprintf(stderr, "%s is missing\n", name); exit(100); }
  return (Function*)found;
}

void expect(const char* what, double error, double limit) {
  const bool good = error <= limit;  // false for NaN
  printf("%s %-28s error %.2e, limit %.0e\n", good ? "ok  " : "FAIL", what, error, limit);
  failures += !good;
}

float random_float() {  // about normal
  float sum = 0;
  for (int i = 0; i < 12; i++) sum += (float)rand() / (float)RAND_MAX;
  return sum - 6;
}
Floats random_floats(size_t n, float size) {
  Floats all(n);
  for (float& x : all) x = size * random_float();
  return all;
}
float from_bf16(uint16_t h) { const uint32_t u = (uint32_t)h << 16; float x; memcpy(&x, &u, 4); return x; }
double from_f16(uint16_t h) {
  const double size = h & 0x7c00 ? std::ldexp(1024 + (h & 1023), (h >> 10 & 31) - 25) : std::ldexp(h & 1023, -24);
  return h & 0x8000 ? -size : size;
}
uint16_t to_bf16(float x) { uint32_t u; memcpy(&u, &x, 4); return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16); }

template <class A, class B> double distance(const A& a, const B& b) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < b.size(); i++) difference += std::pow(a[i] - b[i], 2), size += std::pow(b[i], 2);
  return std::sqrt(difference / size);
}

// A matrix as the library packs it, and the same numbers read back from the layout that layout.h describes.
struct Packed {
  Matrix m;
  std::vector<uint8_t> data, scales;
  Doubles values;  // (n, k)

  Packed(int kind, const std::vector<const float*>& rows, int k) {
    const int n = (int)rows.size(), units = (n + UNIT - 1) / UNIT, padded = round_up(k, GROUP);
    m = {kind, n, k, nullptr, nullptr, nullptr};
    data.resize(unit_bytes(m) * units + 4096);  // prefetching may look ahead
    scales.resize((size_t)units * UNIT * (kind == I8 ? 4 : 4 * padded / 32));
    std::vector<const void*> pointers(rows.begin(), rows.end());
    pointers.resize((size_t)units * UNIT);
    find<void(int, int, int, int, const void* const*, int, uint8_t*, uint8_t*, int)>("smolforge_pack")(
        kind, units, k, padded, pointers.data(), 0, data.data(), scales.data(), THREADS);
    m.data = data.data(), m.scales = scales.data();
    for (int row = 0; row < n; row++)
      for (int i = 0; i < k; i++) values.push_back(read(row, i, padded));
  }
  double read(int row, int i, int padded) const {
    const uint8_t* unit = data.data() + unit_bytes(m) * (row / UNIT);
    const size_t lane = row % UNIT;
    if (m.kind == F32) { float x; memcpy(&x, unit + ((size_t)i * UNIT + lane) * 4, 4); return x; }
    if (m.kind == BF16) { uint16_t x; memcpy(&x, unit + ((size_t)(i / 2) * UNIT + lane) * 4 + i % 2 * 2, 2); return from_bf16(x); }
    if (m.kind == I8) return (unit[((size_t)(i / 4) * UNIT + lane) * 4 + i % 4] - 128) * (double)((const float*)m.scales)[row];
    const uint8_t byte = unit[((size_t)(i / 8) * UNIT + lane) * 4 + i % 4];
    const auto* fine = (const uint16_t*)m.scales + ((size_t)(row / UNIT) * (padded / 32) + i / 32) * 2 * UNIT + lane;
    return (i % 8 < 4 ? byte & 15 : byte >> 4) * from_f16(fine[0]) + from_f16(fine[UNIT]);
  }
  Doubles times(const Doubles& x) const {
    Doubles y(m.n);
    for (int row = 0; row < m.n; row++)
      for (int i = 0; i < m.k; i++) y[row] += values[(size_t)row * m.k + i] * x[i];
    return y;
  }
};

std::vector<const float*> rows_of(const Floats& all, int k) {
  std::vector<const float*> rows;
  for (size_t i = 0; i < all.size(); i += k) rows.push_back(all.data() + i);
  return rows;
}

Doubles normed(const Doubles& x, const Floats& weight) {
  double squares = 0;
  for (double v : x) squares += v * v;
  Doubles y(x.size());
  for (size_t i = 0; i < x.size(); i++) y[i] = x[i] / std::sqrt(squares / (double)x.size() + 1e-5) * weight[i];
  return y;
}

struct Block {
  Packed qkv, o, gate_up, down;
  Floats norm1, norm2;
};

void rotate(double* head, const float* cos, const float* sin) {
  for (int i = 0; i < D / 2; i++) {
    const double a = head[i], b = head[i + D / 2];
    head[i] = a * cos[i] - b * sin[i], head[i + D / 2] = b * cos[i] + a * sin[i];
  }
}

// Logits of the last of some tokens, in double.
Doubles reference(const std::vector<Block>& blocks, const Packed& embedding, const Floats& norm, const Floats& cos, const Floats& sin,
                  const std::vector<int32_t>& tokens) {
  std::vector<Doubles> x;
  for (int token : tokens) x.emplace_back(embedding.values.begin() + token * WIDTH, embedding.values.begin() + (token + 1) * WIDTH);
  for (const Block& block : blocks) {
    std::vector<Doubles> qkv;
    for (size_t t = 0; t < x.size(); t++) {
      qkv.push_back(block.qkv.times(normed(x[t], block.norm1)));
      for (int h = 0; h < HEADS + KV; h++) rotate(&qkv[t][h * D], &cos[t * D / 2], &sin[t * D / 2]);
    }
    for (size_t t = 0; t < x.size(); t++) {
      Doubles mixed(HEADS * D);
      for (int h = 0; h < HEADS; h++) {
        const int k = (HEADS + h / (HEADS / KV)) * D, v = k + KV * D;
        Doubles weight(t + 1);
        double total = 0;
        for (size_t s = 0; s <= t; s++) {
          for (int i = 0; i < D; i++) weight[s] += qkv[t][h * D + i] * qkv[s][k + i];
          total += weight[s] = std::exp(weight[s] / std::sqrt((double)D));
        }
        for (size_t s = 0; s <= t; s++)
          for (int i = 0; i < D; i++) mixed[h * D + i] += weight[s] / total * qkv[s][v + i];
      }
      const Doubles out = block.o.times(mixed);
      for (int i = 0; i < WIDTH; i++) x[t][i] += out[i];
      const Doubles both = block.gate_up.times(normed(x[t], block.norm2));
      Doubles hidden(INNER);
      for (int i = 0; i < INNER; i++) {  // 16 gates, then their 16 ups
        const double gate = both[i / 16 * 32 + i % 16], up = both[i / 16 * 32 + 16 + i % 16];
        hidden[i] = gate / (1 + std::exp(-gate)) * up;
      }
      const Doubles down = block.down.times(hidden);
      for (int i = 0; i < WIDTH; i++) x[t][i] += down[i];
    }
  }
  return embedding.times(normed(x.back(), norm));
}

Floats padded_norm() {
  Floats norm = random_floats(WIDTH, 0.1f);
  for (float& x : norm) x += 1;
  norm.resize(round_up(WIDTH, GROUP));
  return norm;
}

void check_decode(const char* name, int kind, double pack_limit, double limit) {
  const int head_kind = kind == I4 ? I8 : kind, cache_kind = kind == F32 ? F32 : BF16;
  const Floats words = random_floats(VOCAB * WIDTH, 1), zeros(WIDTH);
  std::vector<Block> blocks;
  std::vector<Floats> weights;
  weights.reserve(LAYERS * 5);
  const auto keep = [&](int n, int k) { weights.push_back(random_floats((size_t)n * k, 0.1f)); return rows_of(weights.back(), k); };
  for (int l = 0; l < LAYERS; l++) {
    const auto gates = keep(INNER, WIDTH), ups = keep(INNER, WIDTH);
    std::vector<const float*> both;
    for (int i = 0; i < round_up(INNER, 16); i += 16)
      for (const auto& rows : {gates, ups})
        for (int j = i; j < i + 16; j++) both.push_back(j < INNER ? rows[j] : zeros.data());
    blocks.push_back({{kind, keep((HEADS + 2 * KV) * D, WIDTH), WIDTH}, {kind, keep(WIDTH, HEADS * D), HEADS * D}, {kind, both, WIDTH},
                      {kind, keep(WIDTH, INNER), INNER}, padded_norm(), padded_norm()});
  }
  const Packed embedding(head_kind, rows_of(words, WIDTH), WIDTH);
  const Floats norm = padded_norm();
  Floats cos, sin;
  for (int t = 0; t < CAPACITY; t++)
    for (int i = 0; i < D / 2; i++) {
      const double angle = t * std::pow(10000., -2. * i / D);
      cos.push_back((float)std::cos(angle)), sin.push_back((float)std::sin(angle));
    }
  std::vector<Layer> layers;
  for (const Block& b : blocks) layers.push_back({b.qkv.m, b.o.m, b.gate_up.m, b.down.m, b.norm1.data(), b.norm2.data(), nullptr, nullptr, 1});
  const Shape shape{LAYERS, WIDTH, HEADS, KV, D, INNER, VOCAB, cache_kind, 1e-5f};
  void* model = find<void*(const Shape*, const Layer*, const Matrix*, const Matrix*, const float*, const float*, const float*, int)>("smolforge_open")(
      &shape, layers.data(), &embedding.m, &embedding.m, norm.data(), cos.data(), sin.data(), THREADS);
  std::vector<int32_t> tokens, positions, capacities(TOKENS, CAPACITY);
  std::vector<uint8_t> memory(LAYERS * KV * CAPACITY * (D + round_up(D, UNIT)) * 4);
  std::vector<uint8_t*> caches(TOKENS, memory.data());
  for (int t = 0; t < TOKENS; t++) tokens.push_back(rand() % VOCAB), positions.push_back(t);
  const auto step = find<void(void*, int, const int32_t*, const int32_t*, uint8_t* const*, const int32_t*, int, const int32_t*, float*)>("smolforge_step");
  const auto run = [&](int from, int count) {  // `count` tokens in one step
    Floats logits(VOCAB);
    const int32_t last = count - 1;
    step(model, count, &tokens[from], &positions[from], caches.data(), capacities.data(), 1, &last, logits.data());
    return logits;
  };
  const Floats whole = run(0, TOKENS);
  run(0, 17);
  for (int t = 17; t < TOKENS - 1; t++) run(t, 1);
  const Floats single = run(TOKENS - 1, 1);
  char what[64];
  Doubles packed, plain(weights[0].begin(), weights[0].end());
  const Packed first(kind, rows_of(weights[0], WIDTH), WIDTH);
  snprintf(what, sizeof what, "pack %s", name), expect(what, distance(first.values, plain), pack_limit);
  snprintf(what, sizeof what, "decode %s", name), expect(what, distance(whole, reference(blocks, embedding, norm, cos, sin, tokens)), limit);
  snprintf(what, sizeof what, "decode %s one by one", name), expect(what, distance(single, whole), 0);
  find<void(void*)>("smolforge_close")(model);
}

void check_loss(bool narrow) {
  constexpr int ROWS = 19, IGNORED = -100;
  const float scale = 0.5f, z_weight = 0.01f;
  Floats logits = random_floats(ROWS * VOCAB, 3);
  std::vector<uint16_t> halves;
  for (float& x : logits) halves.push_back(to_bf16(x)), x = narrow ? from_bf16(halves.back()) : x;
  std::vector<int64_t> targets;
  for (int r = 0; r < ROWS; r++) targets.push_back(r == 3 ? IGNORED : rand() % VOCAB);
  Doubles expected, sums, cross_entropy(ROWS), z_loss(ROWS);
  std::vector<float> scales(ROWS);  // of each row
  for (int r = 0; r < ROWS; r++) scales[r] = scale * (1 + r % 3);
  for (int r = 0; r < ROWS; r++) {
    double total = 0;
    for (int i = 0; i < VOCAB; i++) total += std::exp((double)logits[r * VOCAB + i]);
    const bool counts = targets[r] != IGNORED;
    sums.push_back(counts ? std::log(total) - logits[r * VOCAB + targets[r]] : 0);
    sums.push_back(counts ? z_weight * std::pow(std::log(total), 2) : 0);
    for (int i = 0; i < VOCAB; i++) {
      const double p = std::exp((double)logits[r * VOCAB + i]) / total * (1 + 2 * z_weight * std::log(total)) - (i == targets[r]);
      expected.push_back(counts ? scales[r] * p : 0);
    }
  }
  find<void(int64_t, int64_t, void*, int, const int64_t*, int64_t, const float*, float, double*, double*, int)>("smolforge_loss")(
      ROWS, VOCAB, narrow ? (void*)halves.data() : logits.data(), narrow, targets.data(), IGNORED, scales.data(), z_weight, cross_entropy.data(), z_loss.data(), THREADS);
  Doubles found;
  for (int r = 0; r < ROWS; r++) found.push_back(cross_entropy[r]), found.push_back(z_loss[r]);
  for (size_t i = 0; narrow && i < halves.size(); i++) logits[i] = from_bf16(halves[i]);
  expect(narrow ? "loss bf16" : "loss fp32", distance(found, sums), 1e-6);
  expect(narrow ? "gradient bf16" : "gradient fp32", distance(logits, expected), narrow ? 4e-3 : 1e-6);
}

uint32_t hash(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}
uint16_t rounded(double x, uint32_t bits) { const float f = (float)x; uint32_t u; memcpy(&u, &f, 4); return (uint16_t)((u + bits) >> 16); }

void check_adamw() {
  constexpr int N = 40000;  // more than one thread's share
  const float rates[] = {0.999f, 1e-2f, 1.1f, 1e-8f}, beta1 = 0.9f, beta2 = 0.95f;
  const uint32_t key = 0x12345678u;
  std::vector<uint16_t> tensors[4], expected[3];
  for (auto& tensor : tensors) for (float x : random_floats(N, 1)) tensor.push_back(to_bf16(x));
  auto &w = tensors[0], &g = tensors[1], &m = tensors[2], &v = tensors[3];
  for (auto& x : v) x &= 0x7fff;
  for (int i = 0; i < N; i++) {
    const double slope = from_bf16(g[i]), mean = beta1 * from_bf16(m[i]) + (1 - beta1) * slope;
    const double square = beta2 * from_bf16(v[i]) + (1 - beta2) * slope * slope;
    const uint32_t bits = hash(key + (uint32_t)i);
    expected[0].push_back(rounded(from_bf16(w[i]) * rates[0] - rates[1] * mean / (std::sqrt(square) * rates[2] + rates[3]), bits & 0xffff));
    expected[1].push_back(to_bf16((float)mean));
    expected[2].push_back(rounded(square, bits >> 16));
  }
  find<void(int64_t, uint16_t*, const uint16_t*, uint16_t*, uint16_t*, uint32_t, const float*, float, float, int)>("smolforge_rounded_adamw")(
      N, w.data(), g.data(), m.data(), v.data(), key, rates, beta1, beta2, THREADS);
  int different = 0;  // where fp32 and double round to different sides
  for (int i = 0; i < N; i++) different += (w[i] != expected[0][i]) + (m[i] != expected[1][i]) + (v[i] != expected[2][i]);
  expect("adamw, share of other bits", different / (3. * N), 5e-3);
}

}  // namespace

int main(int, char** arguments) {
  library = dlopen(arguments[1], RTLD_NOW);
  if (!library) { fprintf(stderr, "%s\n", dlerror()); return 100; }
  srand(1);
  check_decode("fp32", F32, 0, 1e-5);
  check_decode("bf16", BF16, 3e-3, 0.02);
  check_decode("int8", I8, 0.01, 0.03);
  check_decode("int4", I4, 0.08, 0.03);
  check_loss(false);
  check_loss(true);
  check_adamw();
  return failures;
}

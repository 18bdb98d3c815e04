// The bare loop: every matrix of SmolLM2-135M times one row, and nothing else. No attention, no norms, no sampling,
// no more than one sum of any product is ever looked at. What a decoder on this machine cannot pass.
//
//     g++ -O3 -march=native -pthread bare.cpp -o bare && ./bare 8 2 40
//
// prints one JSON line: the median seconds of 40 passes with 2 threads over weights of 32, 16, 8 or 4 bits (4 has
// groups of 32 with a bfloat16 scale each, and a head of 8, as smolforge packs them). Weights lie row by row, four
// rows are read at a time; threads meet at a barrier after each matrix, as a decoder's must. Written apart from
// decode.cpp on purpose, so that the two can be wrong in different ways.

#include <immintrin.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if !defined(__AVX512VNNI__) || !defined(__AVX512BF16__)
#error "the bare loop is written for AVX-512 with VNNI and bf16"
#endif

namespace {

struct Matrix { int bits, n, k; const uint8_t* weights; const uint16_t* scales; };
struct Row { float f32[1536]; uint16_t bf16[1536]; uint8_t u8[1536]; };

float widened(uint16_t bf16) { const uint32_t u = (uint32_t)bf16 << 16; float x; __builtin_memcpy(&x, &u, 4); return x; }

void rows32(const Matrix& m, const Row& x, float* y, int n) {
  const auto* w = (const float*)m.weights + (size_t)n * m.k;
  __m512 sum[4] = {};
  for (int k = 0; k < m.k; k += 16)
    for (int r = 0; r < 4; r++) sum[r] = _mm512_fmadd_ps(_mm512_loadu_ps(w + (size_t)r * m.k + k), _mm512_loadu_ps(x.f32 + k), sum[r]);
  for (int r = 0; r < 4; r++) y[n + r] = _mm512_reduce_add_ps(sum[r]);
}

void rows16(const Matrix& m, const Row& x, float* y, int n) {
  const auto* w = (const uint16_t*)m.weights + (size_t)n * m.k;
  __m512 sum[4] = {};
  for (int k = 0; k < m.k; k += 32)
    for (int r = 0; r < 4; r++)
      sum[r] = _mm512_dpbf16_ps(sum[r], (__m512bh)_mm512_loadu_si512(w + (size_t)r * m.k + k), (__m512bh)_mm512_loadu_si512(x.bf16 + k));
  for (int r = 0; r < 4; r++) y[n + r] = _mm512_reduce_add_ps(sum[r]);
}

void rows8(const Matrix& m, const Row& x, float* y, int n) {
  const uint8_t* w = m.weights + (size_t)n * m.k;
  __m512i sum[4] = {};
  for (int k = 0; k < m.k; k += 64)
    for (int r = 0; r < 4; r++) sum[r] = _mm512_dpbusd_epi32(sum[r], _mm512_loadu_si512(x.u8 + k), _mm512_loadu_si512(w + (size_t)r * m.k + k));
  for (int r = 0; r < 4; r++) y[n + r] = (float)_mm512_reduce_add_epi32(sum[r]);
}

void rows4(const Matrix& m, const Row& x, float* y, int n) {
  const __m512i low = _mm512_set1_epi8(15);
  for (int r = n; r < n + 4; r++) {
    const uint8_t* w = m.weights + (size_t)r * m.k / 2;
    const uint16_t* scales = m.scales + (size_t)r * m.k / 32;
    __m512 sum = {};
    for (int k = 0; k < m.k; k += 64, w += 32, scales += 2) {  // 32 bytes hold the nibbles of 64 inputs
      const __m256i packed = _mm256_loadu_si256((const __m256i*)w);
      const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(packed), _mm256_srli_epi16(packed, 4), 1);
      const __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_and_si512(both, low), _mm512_loadu_si512(x.u8 + k));
      const __m512 scale = _mm512_insertf32x8(_mm512_set1_ps(widened(scales[0])), _mm256_set1_ps(widened(scales[1])), 1);
      sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, sum);
    }
    y[r] = _mm512_reduce_add_ps(sum);
  }
}

struct Barrier {
  int size;
  std::atomic<int> arrived{0};
  std::atomic<unsigned> phase{0};
  void meet() {
    const unsigned mine = phase.load(std::memory_order_acquire);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
      arrived.store(0, std::memory_order_relaxed);
      phase.store(mine + 1, std::memory_order_release);
    } else {
      for (int spins = 0; phase.load(std::memory_order_acquire) == mine; spins++)
        if (spins > 4000) std::this_thread::yield(); else _mm_pause();
    }
  }
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return fprintf(stderr, "usage: bare BITS THREADS PASSES\n"), 2;
  const int bits = atoi(argv[1]), threads = atoi(argv[2]), passes = atoi(argv[3]);
  constexpr int LAYERS = 30, SHAPES[5][2] = {{960, 576}, {576, 576}, {3072, 576}, {576, 1536}, {49152, 576}};
  std::vector<Matrix> matrices;
  size_t bytes = 0;
  for (int i = 0; i < 4 * LAYERS + 1; i++) {
    const bool head = i == 4 * LAYERS;
    const int* shape = SHAPES[head ? 4 : i % 4];
    matrices.push_back({head && bits == 4 ? 8 : bits, shape[0], shape[1], nullptr, nullptr});
  }
  const auto place = [&](bool real, uint8_t* at) {
    size_t used = 0;
    for (auto& m : matrices) {
      if (real) m.weights = at + used;
      used += ((size_t)m.n * m.k * m.bits / 8 + 63) / 64 * 64;
      if (real) m.scales = (const uint16_t*)(at + used);
      used += m.bits == 4 ? ((size_t)m.n * m.k / 16 + 63) / 64 * 64 : 0;
    }
    return used;
  };
  bytes = place(false, nullptr);
  constexpr size_t LARGE = 2 << 20;  // large pages, which count for a fifth to two fifths
  auto* memory = (uint8_t*)aligned_alloc(LARGE, (bytes + LARGE - 1) / LARGE * LARGE);
  madvise(memory, bytes, MADV_HUGEPAGE);
  for (size_t i = 0; i < bytes; i++) memory[i] = (uint8_t)(0x3c + i % 3);  // as float or bfloat16 a small number, too
  place(true, memory);
  static Row x;
  for (int i = 0; i < 1536; i++) x.f32[i] = 0.01f * (i % 7), x.bf16[i] = 0x3c00 + i % 7, x.u8[i] = i % 7;
  std::vector<float> y(49152);
  std::vector<double> seconds;
  Barrier barrier{threads};
  const auto work = [&](int id) {
    for (int pass = 0; pass < passes + 3; pass++) {  // three warm up
      barrier.meet();
      const auto began = std::chrono::steady_clock::now();
      for (const auto& m : matrices) {
        const auto rows = m.bits == 32 ? rows32 : m.bits == 16 ? rows16 : m.bits == 8 ? rows8 : rows4;
        for (int n = m.n / 4 * id / threads * 4; n < m.n / 4 * (id + 1) / threads * 4; n += 4) rows(m, x, y.data(), n);
        barrier.meet();
      }
      if (id == 0 && pass >= 3) seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count());
    }
  };
  std::vector<std::thread> others;
  for (int id = 1; id < threads; id++) others.emplace_back(work, id);
  work(0);
  for (auto& t : others) t.join();
  std::sort(seconds.begin(), seconds.end());
  printf("{\"seconds\": %.9f, \"bytes\": %zu, \"looked_at\": %g}\n", seconds[seconds.size() / 2], bytes, (double)y[7]);
}

// Squeeze and excitation in the instruction set of this file: see squeeze_excite.h.
#include "squeeze_excite.h"

#include "cpu/simd/vec.h"

namespace convext {
namespace CONVEXT_ISA {
namespace {

using V = Vec<float>;
constexpr int kWidth = V::width;

void sums(const float* x, int64_t pixels, int32_t c, float* out) {
  for (int32_t k = 0; k < c; k += kWidth) {
    const Lanes<float> lanes(c - k);
    V even = V::zero(), odd = V::zero();
    int64_t i = 0;
    for (; i + 2 <= pixels; i += 2) {
      even += load(x + i * c + k, lanes);
      odd += load(x + (i + 1) * c + k, lanes);
    }
    if (i < pixels) even += load(x + i * c + k, lanes);
    store(out + k, even + odd, lanes);
  }
}

void scale(float* x, int64_t pixels, int32_t c, const float* gates) {
  for (int64_t i = 0; i < pixels; ++i, x += c) {
    int32_t k = 0;
    for (; k + kWidth <= c; k += kWidth) store(x + k, load(x + k) * load(gates + k));
    if (k < c) {
      const Lanes<float> lanes(c - k);
      store(x + k, load(x + k, lanes) * load(gates + k, lanes), lanes);
    }
  }
}

constexpr int64_t kSerialWeights = 16384;  // below, threads cost more than they bring
constexpr int32_t kBlockRows = 16, kRowsAtOnce = 4;
constexpr int64_t kAhead = 8192;  // bytes: weights are used once, and as fast as they come

// lane[half][l]: the lane `half` after lane l, around the end. A table, since the compiler would put each index
// together anew at every use.
struct Turns {
  alignas(kVectorBytes) int32_t lane[kWidth][kWidth];
  constexpr Turns() : lane{} {
    for (int half = 1; half < kWidth; ++half) {
      for (int l = 0; l < kWidth; ++l) lane[half][l] = (l + half) % kWidth;
    }
  }
};
constexpr Turns kTurns;

// The sum of all lanes: halves on halves.
CONVEXT_INLINE float sum_of_lanes(V a) {
  CONVEXT_UNROLL
  for (int half = kWidth / 2; half > 0; half /= 2) {
#if defined(__clang__)
    V other;
    for (int l = 0; l < kWidth; ++l) other.v[l] = a.v[kTurns.lane[half][l]];
    a += other;
#else
    Native<float>::bits index;
    __builtin_memcpy(&index, kTurns.lane[half], sizeof index);
    a += __builtin_shuffle(a.v, index);
#endif
  }
  return a.v[0];
}

// out[r] = sum_j w[r, j] * x[j] for the ROWS rows of w.
template <int ROWS>
CONVEXT_INLINE void multiply_rows(const float* w, const float* x, int32_t columns, float* out) {
  V even[ROWS], odd[ROWS];
  CONVEXT_UNROLL
  for (int r = 0; r < ROWS; ++r) even[r] = odd[r] = V::zero();
  int32_t j = 0;
  for (; j + 2 * kWidth <= columns; j += 2 * kWidth) {
    const V first = load(x + j), second = load(x + j + kWidth);
    CONVEXT_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      const float* const row = w + int64_t{r} * columns + j;
      CONVEXT_UNROLL
      for (int64_t at = 0; at < 2 * kVectorBytes; at += kCacheLine) {
        __builtin_prefetch(reinterpret_cast<const char*>(row) + kAhead + at);
      }
      even[r] = fma(even[r], load(row), first);
      odd[r] = fma(odd[r], load(row + kWidth), second);
    }
  }
  for (; j < columns; j += kWidth) {
    const Lanes<float> lanes(columns - j);
    const V last = load(x + j, lanes);
    CONVEXT_UNROLL
    for (int r = 0; r < ROWS; ++r) even[r] = fma(even[r], load(w + int64_t{r} * columns + j, lanes), last);
  }
  CONVEXT_UNROLL
  for (int r = 0; r < ROWS; ++r) out[r] = sum_of_lanes(even[r] + odd[r]);
}

// out[i] = bias[i] + sum_j w[i, j] * x[j]
void multiply(const float* w, const float* bias, const float* x, int32_t rows, int32_t columns, float* out,
              const Parallel& all_threads) {
  const Parallel parallel{all_threads.run, int64_t{rows} * columns < kSerialWeights ? 1 : all_threads.threads};
  parallel.for_each((rows + kBlockRows - 1) / kBlockRows, [&](int64_t block) {
    const int32_t begin = static_cast<int32_t>(block) * kBlockRows;
    const int32_t end = begin + kBlockRows < rows ? begin + kBlockRows : rows;
    int32_t i = begin;
    for (; i + kRowsAtOnce <= end; i += kRowsAtOnce) {
      multiply_rows<kRowsAtOnce>(w + int64_t{i} * columns, x, columns, out + i);
    }
    for (; i < end; ++i) multiply_rows<1>(w + int64_t{i} * columns, x, columns, out + i);
    if (bias == nullptr) return;
    for (int32_t j = begin; j < end; ++j) out[j] += bias[j];
  });
}

template <class F>
void map(float* x, int32_t count, F&& f) {
  for (int32_t i = 0; i < count; i += kWidth) {
    const Lanes<float> lanes(count - i);
    store(x + i, f(load(x + i, lanes)), lanes);
  }
}

void gates(const Excite& e, const float* sums, int64_t rows, int64_t pixels, float* out, float* scratch,
           const Parallel& parallel) {
  float *const mean = scratch, *const squeezed = scratch + e.c;
  const V per_pixel(1.0f / static_cast<float>(pixels));
  for (int32_t k = 0; k < e.c; k += kWidth) {
    const Lanes<float> lanes(e.c - k);
    V sum = V::zero();
    for (int64_t i = 0; i < rows; ++i) sum += load(sums + i * e.c + k, lanes);
    store(mean + k, sum * per_pixel, lanes);
  }
  multiply(e.w1, e.b1, mean, e.squeezed, e.c, squeezed, parallel);
  visit_activation<V>(e.activation,
                      [&](auto f) { map(squeezed, e.squeezed, [&](V z) { return decltype(f)::forward(z); }); });
  multiply(e.w2, e.b2, squeezed, e.c, e.squeezed, out, parallel);
  if (e.gate == Gate::sigmoid) {
    map(out, e.c, [](V z) { return V(1.0f) / (V(1.0f) + exp(-z)); });
  } else {
    map(out, e.c, [](V z) {
      const V shifted = z + V(3.0f);
      return where(shifted < V::zero(), V::zero(), where(shifted > V(6.0f), V(6.0f), shifted)) / V(6.0f);
    });
  }
}

}  // namespace
}  // namespace CONVEXT_ISA

extern const SqueezeExcite CONVEXT_VARIANT(squeeze_excite);
const SqueezeExcite CONVEXT_VARIANT(squeeze_excite) = {CONVEXT_ISA::sums, CONVEXT_ISA::gates, CONVEXT_ISA::scale};

}  // namespace convext

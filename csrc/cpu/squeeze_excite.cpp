// Squeeze and excitation in the instruction set of this file: see squeeze_excite.h.
#include "squeeze_excite.h"

#include "vec.h"

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

// out[i] = bias[i] + sum_j w[i, j] * x[j]: a vector's worth of rows at a time, whose partial sums are added lane by lane.
void multiply(const float* w, const float* bias, const float* x, int32_t rows, int32_t columns, float* out,
              const Parallel& all_threads) {
  const Parallel parallel{all_threads.run, int64_t{rows} * columns < kSerialWeights ? 1 : all_threads.threads};
  parallel.for_each((rows + kWidth - 1) / kWidth, [&](int64_t block) {
    const int32_t i = static_cast<int32_t>(block) * kWidth;
    const int32_t count = rows - i < kWidth ? rows - i : kWidth;
    float lane[kWidth][kWidth];
    for (int32_t r = 0; r < count; ++r) {
      const float* const row = w + int64_t{i + r} * columns;
      V even = V::zero(), odd = V::zero();
      int32_t j = 0;
      for (; j + 2 * kWidth <= columns; j += 2 * kWidth) {
        even = fma(even, load(row + j), load(x + j));
        odd = fma(odd, load(row + j + kWidth), load(x + j + kWidth));
      }
      for (; j < columns; j += kWidth) {
        const Lanes<float> lanes(columns - j);
        even = fma(even, load(row + j, lanes), load(x + j, lanes));
      }
      store(lane[r], even + odd);
    }
    for (int32_t r = 0; r < count; ++r) {
      for (int half = kWidth / 2; half > 0; half /= 2) {
        for (int l = 0; l < half; ++l) lane[r][l] += lane[r][l + half];
      }
      out[i + r] = lane[r][0] + (bias != nullptr ? bias[i + r] : 0.0f);
    }
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
  visit_activation<V>(e.activation, [&](auto f) {
    map(squeezed, e.squeezed, [&](V z) { return decltype(f)::forward(z); });
  });
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

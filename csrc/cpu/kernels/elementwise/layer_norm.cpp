// Layer norm over channels in the instruction set of this file: see layer_norm.h.
#include "layer_norm.h"

#include <cmath>

#include "cpu/kernels/family.h"

namespace convext::CONVEXT_ISA {
namespace {

constexpr int64_t kChunkElements = 8192;  // of x, for a thread at a time

// One pixel after the other: lanes are channels, the last vector masked where `c` is no multiple of the width.
template <class T>
struct Pixels {
  using V = Vec<T>;
  static constexpr int kWidth = V::width;

  const T* x;
  T* y;
  int32_t c;
  T eps;
  const T *gamma, *beta;  // or nullptr
  int32_t whole;          // channels in whole vectors
  Lanes<T> tail;
  V present;  // 1 in the lanes of `tail`, 0 beyond

  Pixels(const ConvProblem& p, const LaunchArgs& args)
      : x(static_cast<const T*>(args.a)),
        y(static_cast<T*>(args.out)),
        c(p.c),
        eps(static_cast<T>(*static_cast<const double*>(args.b))),
        gamma(static_cast<const T*>(args.epilogue.scale)),
        beta(static_cast<const T*>(args.epilogue.shift)),
        whole(p.c / kWidth * kWidth),
        tail(p.c - whole) {
    T ones[kWidth] = {};
    store(ones, V(T(1)), tail);
    present = load(ones);
  }

  // Calls f(x, i) for the pixel's channels, a vector at a time, i alternating among 0 and 1; lanes that are not there
  // are distinguished by f's third argument, which holds 0 in them and 1 in the others.
  template <class F>
  CONVEXT_INLINE void visit(const T* in, F&& f) const {
    const V all(T(1));
    int32_t k = 0;
    for (; k + 2 * kWidth <= whole; k += 2 * kWidth) f(load(in + k), 0, all), f(load(in + k + kWidth), 1, all);
    if (k < whole) f(load(in + k), 0, all), k += kWidth;
    if (k < c) f(load(in + k, tail), 1, present);
  }

  static CONVEXT_INLINE T total(V part) {
    T lane[kWidth];
    store(lane, part);
    CONVEXT_UNROLL
    for (int half = kWidth / 2; half > 0; half /= 2) {
      for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
    }
    return lane[0];
  }

  void normalise(int64_t pixel) const {
    const T* const in = x + pixel * c;
    T* const out = y + pixel * c;
    const T per_channel = T(1) / static_cast<T>(c);
    V sum[2] = {V::zero(), V::zero()};
    visit(in, [&](V a, int i, V) __attribute__((always_inline)) { sum[i] += a; });
    const V rounded(total(sum[0] + sum[1]) * per_channel);
    V left[2] = {V::zero(), V::zero()}, square[2] = {V::zero(), V::zero()};
    visit(in, [&](V a, int i, V present) __attribute__((always_inline)) {
      const V d = (a - rounded) * present;
      left[i] += d;
      square[i] = fma(square[i], d, d);
    });
    // What is left is how far rounding has put the mean off (Chan, Golub and LeVeque, 1983).
    const T off = total(left[0] + left[1]) * per_channel;
    const V mean = rounded + V(off);
    const T variance = total(square[0] + square[1]) * per_channel - off * off;
    const V factor(T(1) / std::sqrt((variance < 0 ? 0 : variance) + eps));
    const auto finish = [&](int32_t k, auto... lanes) __attribute__((always_inline)) {
      V z = (load(in + k, lanes...) - mean) * factor;
      if (gamma != nullptr) z = z * load(gamma + k, lanes...);
      if (beta != nullptr) z += load(beta + k, lanes...);
      store(out + k, z, lanes...);
    };
    for (int32_t k = 0; k < whole; k += kWidth) finish(k);
    if (whole < c) finish(whole, tail);
  }
};

template <class T>
const char* launch(const ConvProblem& p, const LaunchArgs& args) {
  const Pixels<T> pixels(p, args);
  const int64_t count = p.nhw(), size = kChunkElements / p.c > 1 ? kChunkElements / p.c : 1;
  args.parallel->for_each((count + size - 1) / size, [&](int64_t chunk) {
    const int64_t end = (chunk + 1) * size < count ? (chunk + 1) * size : count;
    for (int64_t i = chunk * size; i < end; ++i) pixels.normalise(i);
  });
  return nullptr;
}

const char* reject(const ConvProblem& p) {
  return p.is_pointwise() && p.is_unit_stride() && p.c == p.k && p.groups == 1 ? nullptr : "it normalises no pixels";
}

}  // namespace
}  // namespace convext::CONVEXT_ISA

CONVEXT_DEFINE_VARIANTS(layer_norm,
                        cpu_variant<T>(name, Algorithm::layer_norm, Pass::kFprop, reject, launch<T>, nullptr))

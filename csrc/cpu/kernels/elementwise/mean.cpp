// Compiled for AVX512-BF16, too.
//
// The mean over pixels in the instruction set of this file: see mean.h.
#include "mean.h"

#include "cpu/kernels/family.h"

namespace convext::CONVEXT_ISA {
namespace {

constexpr int kVectors = 4;  // channels of a thread's turn, in vectors: sums of a row and of the rows stay in registers

// out[0 .. lanes) = factor * the sum over h x w pixels, `c` apart, of x[0 .. lanes).
template <class T, class... L>
CONVEXT_INLINE void mean_of(const T* x, int32_t h, int32_t w, int64_t c, compute_t<T> factor, T* out, int vectors,
                            L... lanes) {
  using V = VecOf<T>;
  V sum[kVectors];
  for (V& s : sum) s = V::zero();
  for (int32_t i = 0; i < h; ++i) {
    V row[kVectors];
    for (V& r : row) r = V::zero();
    for (int32_t j = 0; j < w; ++j, x += c) {
      for (int v = 0; v < vectors; ++v) row[v] += load_as(x + v * V::width, lanes...);
    }
    for (int v = 0; v < vectors; ++v) sum[v] += row[v];
  }
  for (int v = 0; v < vectors; ++v) store_as(out + v * V::width, sum[v] * V(factor), lanes...);
}

template <class T>
const char* launch(const ConvProblem& p, const LaunchArgs& args) {
  using C = compute_t<T>;
  constexpr int kWidth = VecOf<T>::width, kTurn = kVectors * kWidth;
  const T* const x = static_cast<const T*>(args.a);
  T* const y = static_cast<T*>(args.out);
  const C factor = C(1) / (static_cast<C>(p.h) * static_cast<C>(p.w));
  const int64_t c = p.c, turns = (c + kTurn - 1) / kTurn;
  args.parallel->for_each(p.n * turns, [&](int64_t turn) {
    const int64_t image = turn / turns, end = (turn % turns + 1) * kTurn;
    int64_t k = end - kTurn;
    const auto of = [&](int vectors, auto... lanes) {
      mean_of(x + image * p.h * p.w * c + k, p.h, p.w, c, factor, y + image * c + k, vectors, lanes...);
    };
    if (end <= c) return of(kVectors);
    for (; k + kWidth <= c; k += kWidth) of(1);
    if (k < c) of(1, Lanes<C>(c - k));
  });
  return nullptr;
}

const char* reject(const ConvProblem& p) {
  return p.groups == p.c && p.k == p.c && p.r == p.h && p.s == p.w && p.p() == 1 && p.q() == 1
             ? nullptr
             : "it is no mean over all pixels";
}

}  // namespace
}  // namespace convext::CONVEXT_ISA

CONVEXT_DEFINE_VARIANTS(mean, cpu_variant<T>(name, Algorithm::mean, Pass::kFprop, reject, launch<T>, nullptr))

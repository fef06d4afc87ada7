// The plain loop nests in float64 that every kernel is held against, and what rounding allows.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

#include "core/conv_problem.h"
#include "core/epilogue.h"

namespace convext::reference {

// One result with what its error bound needs: sum |a b| and sqrt(sum (a b)^2) over the products that it adds up.
struct Sums {
  std::vector<double> value, magnitude, square;
  explicit Sums(int64_t size) : value(size), magnitude(size), square(size) {}
  void add(int64_t i, double product) {
    value[i] += product;
    magnitude[i] += std::abs(product);
    square[i] += product * product;
  }
};

// Offsets of NCHW coordinates in a dense tensor of the layout; of a volume's with D * H for H.
inline int64_t offset(Layout layout, int64_t n, int64_t c, int64_t h, int64_t w, int64_t C, int64_t H, int64_t W) {
  return layout == Layout::kNHWC ? ((n * H + h) * W + w) * C + c : ((n * C + c) * H + h) * W + w;
}

// Calls f(offset in y, offset in w, offset in x) for every product of the convolution; w is K, C/groups, T, R, S, in
// memory order KCTRS, or KTRSC with `krsc`.
template <class F>
void for_products(const ConvProblem& p, bool krsc, F&& f) {
  const int cg = p.c_per_group(), kg = p.k_per_group();
  for (int n = 0; n < p.n; ++n)
    for (int k = 0; k < p.k; ++k)
      for (int ozp = 0; ozp < p.z() * p.p(); ++ozp)
        for (int oq = 0; oq < p.q(); ++oq)
          for (int tr = 0; tr < p.t * p.r; ++tr) {
            const int d = p.d_of(ozp / p.p(), tr / p.r), h = p.h_of(ozp % p.p(), tr % p.r);
            if (d < 0 || d >= p.d || h < 0 || h >= p.h) continue;
            for (int s = 0; s < p.s; ++s) {
              const int w = p.w_of(oq, s);
              if (w < 0 || w >= p.w) continue;
              const int64_t y_at = offset(p.y_layout, n, k, ozp, oq, p.k, p.z() * p.p(), p.q());
              for (int c = 0; c < cg; ++c) {
                const int64_t w_at = krsc ? ((int64_t{k} * p.t * p.r + tr) * p.s + s) * cg + c
                                          : ((int64_t{k} * cg + c) * p.t * p.r + tr) * p.s + s;
                f(y_at, w_at, offset(p.x_layout, n, k / kg * cg + c, d * p.h + h, w, p.c, p.d * p.h, p.w));
              }
            }
          }
}

inline Sums convolve(Pass pass, const ConvProblem& p, bool krsc, const std::vector<double>& a,
                     const std::vector<double>& b) {
  Sums out(pass == Pass::kFprop ? p.y_size() : pass == Pass::kDgrad ? p.x_size() : p.w_size());
  for_products(p, krsc, [&](int64_t y, int64_t w, int64_t x) {
    if (pass == Pass::kFprop) out.add(y, a[x] * b[w]);
    if (pass == Pass::kDgrad) out.add(x, a[y] * b[w]);
    if (pass == Pass::kWgrad) out.add(w, a[y] * b[x]);
  });
  return out;
}

// Unit roundoffs.
inline double roundoff(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return 0x1p-53;
    case DType::kFloat32: return 0x1p-24;
    case DType::kBFloat16: return 0x1p-8;
    default: return 0x1p-11;
  }
}

// Bound on the error of one sum of n products, before it is rounded to its dtype: lambda sqrt(n) u sum|ab|, the
// probabilistic bound of Higham and Mary (SIAM J. Sci. Comput. 41, 2019), with lambda = 4; and where operands are
// rounded to tf32 first, independent errors of at most 2^-11 each: lambda 2^-11 sqrt(2 sum (ab)^2).
inline double sum_bound(DType accumulate, double n, double magnitude, double square, bool tf32) {
  constexpr double kLambda = 4;
  const double sum = kLambda * std::sqrt(n + 1) * roundoff(accumulate) * magnitude;
  return sum + (tf32 ? kLambda * 0x1p-11 * std::sqrt(2 * square) : 0.0);
}

}  // namespace convext::reference

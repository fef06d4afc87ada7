// One SIMD vector, as wide as the instruction set that this file is compiled for: 16, 8 or 4 floats, half as many
// doubles. It is a GCC vector type in a struct, so that arithmetic is the compiler's own (a * b + c contracts to an
// FMA) and every activation of epilogue.h works on it as it does on scalars.
//
//   Vec<T>          arithmetic, comparisons, where(mask, a, b), exp, erf
//   load, store     unaligned; with Lanes<T>(n) only the first n elements are touched, the others read as 0
//
// Everything here is in the instruction set's own namespace and always inlined, so that no copy of it can be shared
// with code compiled for another instruction set.
#pragma once
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>  // all that is there without AVX; the whole takes GCC longer than most kernels
#endif
#include <cstdint>

#include "isa.h"

#define CONVEXT_INLINE inline __attribute__((always_inline))
#define CONVEXT_LAMBDA_INLINE __attribute__((always_inline))  // where a lambda takes its attribute
#define CONVEXT_PRAGMA_(text) _Pragma(#text)
#define CONVEXT_UNROLL CONVEXT_PRAGMA_(GCC unroll 32)

namespace convext::CONVEXT_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kVectorRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kVectorRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kVectorRegisters = 32;
#else
constexpr int kVectorBytes = 16, kVectorRegisters = 16;
#endif

// The compiler's vector types, spelled out for each element: GCC takes no vector_size on a template's parameter.
template <class T>
struct Native;
template <>
struct Native<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef float unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(float)), may_alias));
  typedef int32_t bits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Native<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef double unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(double)), may_alias));
  typedef int64_t bits __attribute__((vector_size(kVectorBytes)));
};

// The result of a comparison: all bits of a lane set, or none.
template <class T>
struct Mask {
  typename Native<T>::bits m;

  friend CONVEXT_INLINE Mask operator&(Mask a, Mask b) { return {a.m & b.m}; }
  friend CONVEXT_INLINE Mask operator|(Mask a, Mask b) { return {a.m | b.m}; }
};

template <class T>
struct Vec {
  using NativeVector = typename Native<T>::type;
  static constexpr int width = kVectorBytes / sizeof(T);
  NativeVector v;

  Vec() = default;
  CONVEXT_INLINE Vec(NativeVector native) : v(native) {}
  // Broadcast; x - 0 keeps the sign of a zero, x + 0 does not.
  CONVEXT_INLINE explicit Vec(T scalar) : v(scalar - NativeVector{}) {}

  static CONVEXT_INLINE Vec zero() { return NativeVector{}; }

  CONVEXT_INLINE Vec& operator+=(Vec b) { return v += b.v, *this; }
  friend CONVEXT_INLINE Vec operator-(Vec a) { return -a.v; }
  friend CONVEXT_INLINE Vec operator+(Vec a, Vec b) { return a.v + b.v; }
  friend CONVEXT_INLINE Vec operator-(Vec a, Vec b) { return a.v - b.v; }
  friend CONVEXT_INLINE Vec operator*(Vec a, Vec b) { return a.v * b.v; }
  friend CONVEXT_INLINE Vec operator/(Vec a, Vec b) { return a.v / b.v; }
  friend CONVEXT_INLINE Mask<T> operator<(Vec a, Vec b) { return {a.v < b.v}; }
  friend CONVEXT_INLINE Mask<T> operator<=(Vec a, Vec b) { return {a.v <= b.v}; }
  friend CONVEXT_INLINE Mask<T> operator>(Vec a, Vec b) { return {a.v > b.v}; }
  friend CONVEXT_INLINE Mask<T> operator>=(Vec a, Vec b) { return {a.v >= b.v}; }

  // Found by argument-dependent lookup from the activations, whose scalar form is in epilogue.h.
  friend CONVEXT_INLINE Vec where(Mask<T> m, Vec a, Vec b) { return m.m ? a.v : b.v; }
};

// acc + a * b in one rounding where the instruction set has it.
template <class T>
CONVEXT_INLINE Vec<T> fma(Vec<T> acc, Vec<T> a, Vec<T> b) {
  return acc.v + a.v * b.v;
}

// The other operand only where the comparison holds: a NaN in `a` stays. One instruction on x86, whose minimum and
// maximum return their second operand where either is NaN.
template <class T>
CONVEXT_INLINE Vec<T> max_keep_nan(Vec<T> a, Vec<T> floor) {
  return where(a < floor, floor, a);
}
template <class T>
CONVEXT_INLINE Vec<T> min_keep_nan(Vec<T> a, Vec<T> ceiling) {
  return where(a > ceiling, ceiling, a);
}
#if defined(__x86_64__)
#if defined(__AVX512F__)  // masks of ones: the plain forms make GCC 12 warn of its own header
#define CONVEXT_X86(operation, suffix) _mm512_maskz_##operation##_##suffix
#define CONVEXT_X86_MASK -1,
#elif defined(__AVX2__)
#define CONVEXT_X86(operation, suffix) _mm256_##operation##_##suffix
#else
#define CONVEXT_X86(operation, suffix) _mm_##operation##_##suffix
#endif
#if !defined(CONVEXT_X86_MASK)
#define CONVEXT_X86_MASK
#endif
#define CONVEXT_MINIMUM(T, suffix)                                    \
  CONVEXT_INLINE Vec<T> max_keep_nan(Vec<T> a, Vec<T> floor) {        \
    return CONVEXT_X86(max, suffix)(CONVEXT_X86_MASK floor.v, a.v);   \
  }                                                                   \
  CONVEXT_INLINE Vec<T> min_keep_nan(Vec<T> a, Vec<T> ceiling) {      \
    return CONVEXT_X86(min, suffix)(CONVEXT_X86_MASK ceiling.v, a.v); \
  }
CONVEXT_MINIMUM(float, ps)
CONVEXT_MINIMUM(double, pd)
#undef CONVEXT_MINIMUM
#undef CONVEXT_X86
#undef CONVEXT_X86_MASK
#endif

// ---- Memory ----

// The first n lanes of a vector, 0 <= n; all of them where n >= width.
template <class T>
struct Lanes {
#if defined(__AVX512F__)
  uint32_t bits;
  CONVEXT_INLINE explicit Lanes(int64_t n) : bits(n >= Vec<T>::width ? (1u << Vec<T>::width) - 1 : (1u << n) - 1) {}
#elif defined(__AVX2__)
  __m256i mask;
  CONVEXT_INLINE explicit Lanes(int64_t n) {
    typename Native<T>::bits index;
    for (int i = 0; i < Vec<T>::width; ++i) index[i] = i;
    const int limit = n < Vec<T>::width ? static_cast<int>(n) : Vec<T>::width;
    mask = reinterpret_cast<__m256i>(index < limit);
  }
#else
  int n;
  CONVEXT_INLINE explicit Lanes(int64_t count) : n(count < Vec<T>::width ? static_cast<int>(count) : Vec<T>::width) {}
#endif
};

template <class T>
CONVEXT_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Native<T>::unaligned*>(p);
}

template <class T>
CONVEXT_INLINE void store(T* p, Vec<T> a) {
  *reinterpret_cast<typename Native<T>::unaligned*>(p) = a.v;
}

#if defined(__AVX512F__)
CONVEXT_INLINE Vec<float> load(const float* p, Lanes<float> lanes) {
  return static_cast<Native<float>::type>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes.bits), p));
}
CONVEXT_INLINE Vec<double> load(const double* p, Lanes<double> lanes) {
  return static_cast<Native<double>::type>(_mm512_maskz_loadu_pd(static_cast<__mmask8>(lanes.bits), p));
}
CONVEXT_INLINE void store(float* p, Vec<float> a, Lanes<float> lanes) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>(lanes.bits), a.v);
}
CONVEXT_INLINE void store(double* p, Vec<double> a, Lanes<double> lanes) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>(lanes.bits), a.v);
}
#elif defined(__AVX2__)
CONVEXT_INLINE Vec<float> load(const float* p, Lanes<float> lanes) {
  return static_cast<Native<float>::type>(_mm256_maskload_ps(p, lanes.mask));
}
CONVEXT_INLINE Vec<double> load(const double* p, Lanes<double> lanes) {
  return static_cast<Native<double>::type>(_mm256_maskload_pd(p, lanes.mask));
}
CONVEXT_INLINE void store(float* p, Vec<float> a, Lanes<float> lanes) { _mm256_maskstore_ps(p, lanes.mask, a.v); }
CONVEXT_INLINE void store(double* p, Vec<double> a, Lanes<double> lanes) { _mm256_maskstore_pd(p, lanes.mask, a.v); }
#else
template <class T>
CONVEXT_INLINE Vec<T> load(const T* p, Lanes<T> lanes) {
  Vec<T> a = Vec<T>::zero();
  for (int i = 0; i < lanes.n; ++i) a.v[i] = p[i];
  return a;
}
template <class T>
CONVEXT_INLINE void store(T* p, Vec<T> a, Lanes<T> lanes) {
  for (int i = 0; i < lanes.n; ++i) p[i] = a.v[i];
}
#endif

// ---- Elementary functions ----

// c[0] + c[1] x + c[2] x^2 + ..., by Horner's rule.
template <class T, int N>
CONVEXT_INLINE Vec<T> polynomial(Vec<T> x, const T (&c)[N]) {
  Vec<T> sum(c[N - 1]);
  CONVEXT_UNROLL
  for (int i = N - 2; i >= 0; --i) sum = fma(Vec<T>(c[i]), sum, x);
  return sum;
}

// What exp needs to know about a floating-point format.
template <class T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float kRound = 12582912.0f;                     // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLn2High = 0.693359375f;                  // few bits: n * kLn2High is exact
  static constexpr float kLn2Low = -2.12194440054690583e-4f;       // ln 2 - kLn2High
  static constexpr float kOverflow = 89.0f, kUnderflow = -105.0f;  // beyond: infinity, zero
  static constexpr int kBias = 127, kMantissaBits = 23;
  static constexpr float kSeries[] = {
      1.0f, 1.0f, 0.5f, 1.66665762663e-1f, 4.16665561497e-2f, 8.36317893118e-3f, 1.39261840377e-3f};  // 1.1e-8
};
template <>
struct ExpConstants<double> {
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2High = 0.693147180369123816490;
  static constexpr double kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kOverflow = 710.0, kUnderflow = -747.0;
  static constexpr int kBias = 1023, kMantissaBits = 52;
  static constexpr double kSeries[] = {1.0,
                                       1.0,
                                       0.5,
                                       1.6666666666666671e-1,
                                       4.16666666666666698e-2,
                                       8.33333333332613513e-3,
                                       1.38888888888837483e-3,
                                       1.98412698748206253e-4,
                                       2.48015873255477412e-5,
                                       2.75572554002064244e-6,
                                       2.75572736431102953e-7,
                                       2.51052170047207452e-8,
                                       2.09146869680868772e-9};  // 2.3e-19
};

// p 2^n for whole n from a round-to-nearest addition: `shifted` is n + 1.5 2^(mantissa bits). Subnormal results are
// right, too: without an instruction for it, 2^n is applied in two factors.
#if defined(__AVX512F__)
CONVEXT_INLINE Vec<float> times_power_of_2(Vec<float> p, Vec<float> n, Vec<float>) {
  return _mm512_maskz_scalef_ps(-1, p.v, n.v);
}
CONVEXT_INLINE Vec<double> times_power_of_2(Vec<double> p, Vec<double> n, Vec<double>) {
  return _mm512_maskz_scalef_pd(-1, p.v, n.v);
}
#else
template <class T>
CONVEXT_INLINE Vec<T> times_power_of_2(Vec<T> p, Vec<T>, Vec<T> shifted) {
  using Constants = ExpConstants<T>;
  using Bits = typename Native<T>::bits;
  using Reals = typename Native<T>::type;
  const Reals magic = Vec<T>(Constants::kRound).v;
  const Bits exponent = reinterpret_cast<Bits>(shifted.v) - reinterpret_cast<Bits>(magic);  // n as an integer
  const Bits half = exponent >> 1;
  const Reals scale1 = reinterpret_cast<Reals>((half + Constants::kBias) << Constants::kMantissaBits);
  const Reals scale2 = reinterpret_cast<Reals>((exponent - half + Constants::kBias) << Constants::kMantissaBits);
  return p.v * scale1 * scale2;
}
#endif

// exp(x) = 2^n exp(r) with n = round(x / ln 2), |r| <= ln 2 / 2, where a fit at
// Chebyshev nodes of (exp(r) - 1 - r) / r^2 leaves a relative error far below rounding. NaN and infinities as in C.
template <class T>
CONVEXT_INLINE Vec<T> exp(Vec<T> x) {
  using Constants = ExpConstants<T>;
  x = max_keep_nan(min_keep_nan(x, Vec<T>(Constants::kOverflow)), Vec<T>(Constants::kUnderflow));
  const Vec<T> magic(Constants::kRound);
  const Vec<T> shifted = fma(magic, x, Vec<T>(T(1.44269504088896340736)));
  const Vec<T> n = shifted - magic;
  const Vec<T> r = fma(fma(x, n, Vec<T>(-Constants::kLn2High)), n, Vec<T>(-Constants::kLn2Low));
  return times_power_of_2(polynomial(r, Constants::kSeries), n, shifted);
}

// Chebyshev fits (50-digit arithmetic) written as polynomials in a variable that runs over [-1, 1]:
//   kSmall  erf(x) / x      in 2 x^2 - 1, 0 <= x <= 1              relative error 1e-9  (float), 8e-18 (double)
//   kLarge  exp(x^2)erfc(x) in 1 / (x + 1) scaled, 1 <= x <= kOne  absolute error 2e-8  (float), 3e-17 (double)
template <class T>
struct ErfConstants;
template <>
struct ErfConstants<float> {
  static constexpr float kOne = 4.0f;  // erf rounds to 1 from here
  static constexpr float kSmall[] = {
      0.96546873863755107612f,   -0.1405360972815370692f,      0.019852497722779588874f, -0.0022854195288923048908f,
      0.0002175119897573919265f, -0.000017669080811751212167f, 1.2316401734510411824e-6f};
  static constexpr float kLarge[] = {
      0.27155288409165221918f,     0.14663763663236247422f,     0.010853060243841468085f,  -0.0013868195711985985564f,
      -0.00011242900102067941617f, 0.000041258322153584851258f, -2.0004662594330803926e-6f};
};
template <>
struct ErfConstants<double> {
  static constexpr double kOne = 6.0;
  static constexpr double kSmall[] = {
      0.96546873866986730122,    -0.14053608902271711934,     0.019852496688984218696,   -0.0022854855611441132101,
      0.00021751715603564406924, -0.000017537169441124825434, 1.2233827638116997864e-6,  -7.5115692866008896341e-8,
      4.1157514975886475716e-9,  -2.0352284048994670436e-10,  9.2112512583482652733e-12, -3.8078827395263412615e-13};
  static constexpr double kLarge[] = {
      0.24402507744132422756,     0.1694709719513042671,     0.016466202800373921925,   -0.0021703781610284673225,
      -0.00030971232530340385193, 0.00010776601398781735904, -2.6236605978883057642e-6, -4.8789614346686761508e-6,
      1.2089426531407290077e-6,   1.1743593023460481871e-9,  -8.0338962403906653693e-8, 2.3617677096453470991e-8,
      -1.4819384429167027915e-9,  -1.3680430596746379586e-9, 6.3159093943569348524e-10, -1.0462020568051078832e-10,
      -3.09673880573753522e-11,   1.5432244526888715998e-11};
};

// erf(x): x times a polynomial up to |x| = 1, then 1 - exp(-x^2) times a polynomial in 1 / (|x| + 1). NaN passes.
template <class T>
CONVEXT_INLINE Vec<T> erf(Vec<T> x) {
  using Constants = ErfConstants<T>;
  const Vec<T> one(T(1)), two(T(2));
  const Vec<T> magnitude = min_keep_nan(where(x < Vec<T>::zero(), -x, x), Vec<T>(Constants::kOne));
  const Vec<T> square = magnitude * magnitude;
  const Vec<T> small = x * polynomial(two * square - one, Constants::kSmall);
  // t = 1 / (|x| + 1) runs from 1 / (kOne + 1) to 1 / 2; mapped to [-1, 1].
  constexpr T low = T(1) / (Constants::kOne + 1), high = T(0.5);
  const Vec<T> t = one / (magnitude + one);
  const Vec<T> mapped = (t - Vec<T>((high + low) / 2)) * Vec<T>(2 / (high - low));
  const Vec<T> tail = one - exp(-square) * polynomial(mapped, Constants::kLarge);
  const Vec<T> large = where(magnitude >= Vec<T>(Constants::kOne), one, tail);
  return where(magnitude < one, small, where(x < Vec<T>::zero(), -large, large));
}

// P(X <= z) of a standard normal X, for GELU (epilogue.h): 1/2 + z times a polynomial in z^2 - kCentre, a minimax fit
// to 5.6e-9 over |z| <= kEnd; beyond, 0 below and 1 above to rounding. A priori, with u = 2^-24, rounding adds at most
//
//   u (1 + |z| sum_k ((k + 1) |c_k| |t|^k + k |c_k| |t|^k)) <= 13.7 u,        t = z^2 - kCentre
//
// of which tests see less than 2 u. No division and no exponential: half the time of erf's. NaN passes.
struct NormalConstants {
  static constexpr float kEnd = 5.4f, kCentre = 14.58f;
  static constexpr float kSeries[] = {1.309281141e-01f, -4.480655771e-03f, 2.281534835e-04f, -1.265120773e-05f,
                                      7.105402915e-07f, -3.900911238e-08f, 2.050762449e-09f, -1.013478051e-10f,
                                      4.642235381e-12f, -2.052962428e-13f, 9.061937940e-15f, -3.201229469e-16f,
                                      7.135302977e-18f, -3.234831699e-19f, 2.342471612e-20f, -5.842104440e-22f};
};
CONVEXT_INLINE Vec<float> normal_cdf(Vec<float> z) {
  using Constants = NormalConstants;
  const Vec<float> inside = max_keep_nan(min_keep_nan(z, Vec<float>(Constants::kEnd)), Vec<float>(-Constants::kEnd));
  const Vec<float> t = fma(Vec<float>(-Constants::kCentre), inside, inside);
  const Vec<float> cdf = fma(Vec<float>(0.5f), inside, polynomial(t, Constants::kSeries));
  return where(z < Vec<float>(-Constants::kEnd), Vec<float>::zero(), cdf);
}

}  // namespace convext::CONVEXT_ISA

// Loads and stores that convert between the storage types and the types kernels compute in: bfloat16 and float16 are
// read into vectors of float and rounded to the nearest, ties to even, on the way out; NaN stays NaN.
//
//   load_as(p), load_as(p, n)         Vec<compute_t<S>> from S*; with n, a number or Lanes, only the first n elements
//   store_as(p, a), store_as(p, a, n) are touched
#pragma once
#include <cstring>
#include <type_traits>

#include "vec.h"

namespace convext::CONVEXT_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class S>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <class S>
using compute_t = typename Compute<S>::type;

// A vector of what elements of S are computed in.
template <class S>
using VecOf = Vec<compute_t<S>>;

template <class S>
constexpr DType kDType = DType::kFloat32;
template <>
inline constexpr DType kDType<double> = DType::kFloat64;
template <>
inline constexpr DType kDType<BFloat16> = DType::kBFloat16;

// X(type, name, ...) for the types that kernels of this instruction set are built for. AVX512-BF16 adds products of
// bfloat16 to AVX-512 and nothing else, so that is all it is used for.
#if defined(__AVX512BF16__)
#define CONVEXT_FOR_ELEMENTS(X, ...) X(::convext::CONVEXT_ISA::BFloat16, bf16, ##__VA_ARGS__)
#else
#define CONVEXT_FOR_ELEMENTS(X, ...) X(float, f32, ##__VA_ARGS__) X(double, f64, ##__VA_ARGS__)
#endif

// "<base>_<type>_<instruction set>", the name of a packed order.
#define CONVEXT_FORMAT_NAME(T, base)                                 \
  (kDType<T> == DType::kFloat64   ? CONVEXT_VARIANT_NAME(base##_f64) \
   : kDType<T> == DType::kFloat32 ? CONVEXT_VARIANT_NAME(base##_f32) \
                                  : CONVEXT_VARIANT_NAME(base##_bf16))

using FloatBits = Native<float>::bits;
using FloatReals = Native<float>::type;
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t UnalignedHalves __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));

// ---- Bits of a half, one a lane, to float and back ----

CONVEXT_INLINE Vec<float> widen(BFloat16, Halves h) {
  return reinterpret_cast<FloatReals>(__builtin_convertvector(h, FloatBits) << 16);
}

#if defined(__AVX512BF16__)
// The instruction takes subnormal floats for zero, whatever the floating-point environment says.
CONVEXT_INLINE Halves narrow(BFloat16, Vec<float> a) { return reinterpret_cast<Halves>(_mm512_cvtneps_pbh(a.v)); }
#else
CONVEXT_INLINE Halves narrow(BFloat16, Vec<float> a) {
  const FloatBits u = reinterpret_cast<FloatBits>(a.v);
  const FloatBits rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const FloatBits nan = (u >> 16) | 0x40;  // quiet, the payload's upper bits kept
  return __builtin_convertvector((u & 0x7fffffff) > 0x7f800000 ? nan : rounded, Halves);
}
#endif

#if defined(__AVX512F__)
CONVEXT_INLINE Vec<float> widen(Float16, Halves h) {
  return static_cast<FloatReals>(_mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(h)));
}
CONVEXT_INLINE Halves narrow(Float16, Vec<float> a) {
  return reinterpret_cast<Halves>(_mm512_maskz_cvtps_ph(0xffff, a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
// A float16 is 2^-24 times an integer where it is subnormal, and so is a float in [0.5, 1) by its last place: adding
// and subtracting 0.5 converts, rounding included. The rest differs in the exponent's bias alone, 127 - 15 = 112.
CONVEXT_INLINE Vec<float> widen(Float16, Halves h) {
  const FloatBits u = __builtin_convertvector(h, FloatBits);
  const FloatBits magnitude = u & 0x7fff, sign = (u & 0x8000) << 16;
  const FloatBits rebias = (magnitude << 13) + (112 << 23);
  const FloatBits normal = magnitude >= 0x7c00 ? rebias + (112 << 23) : rebias;
  const FloatReals tiny = reinterpret_cast<FloatReals>(magnitude + 0x3f000000) - 0.5f;
  const FloatBits bits = magnitude < 0x400 ? reinterpret_cast<FloatBits>(tiny) : normal;
  return reinterpret_cast<FloatReals>(bits | sign);
}

CONVEXT_INLINE Halves narrow(Float16, Vec<float> a) {
  const FloatBits u = reinterpret_cast<FloatBits>(a.v);
  const FloatBits magnitude = u & 0x7fffffff, sign = (u >> 16) & 0x8000;
  const FloatBits normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const FloatBits tiny = reinterpret_cast<FloatBits>(reinterpret_cast<FloatReals>(magnitude) + 0.5f) - 0x3f000000;
  FloatBits bits = magnitude < (113 << 23) ? tiny : normal;
  bits = magnitude >= (143 << 23) ? FloatBits{} + 0x7c00 : bits;  // 2^16 and more, infinity
  bits = magnitude > 0x7f800000 ? FloatBits{} + 0x7e00 : bits;    // NaN
  return __builtin_convertvector(bits | sign, Halves);
}
#endif

// ---- Memory ----

#if defined(__AVX512BF16__)
// a, and b behind it.
CONVEXT_INLINE void store_pair(BFloat16* p, Vec<float> a, Vec<float> b) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v));
}
#endif

template <class S>
CONVEXT_INLINE Vec<float> load_as(const S* p) {
  return widen(S{}, *reinterpret_cast<const UnalignedHalves*>(p));
}
template <class S>
CONVEXT_INLINE void store_as(S* p, Vec<float> a) {
  *reinterpret_cast<UnalignedHalves*>(p) = narrow(S{}, a);
}
#if defined(__AVX512F__)
template <class S>
CONVEXT_INLINE Vec<float> load_as(const S* p, Lanes<float> lanes) {
  return widen(S{}, reinterpret_cast<Halves>(_mm256_maskz_loadu_epi16(lanes.bits, p)));
}
template <class S>
CONVEXT_INLINE void store_as(S* p, Vec<float> a, Lanes<float> lanes) {
  _mm256_mask_storeu_epi16(p, lanes.bits, reinterpret_cast<__m256i>(narrow(S{}, a)));
}
template <class S>
CONVEXT_INLINE Vec<float> load_as(const S* p, int64_t n) {
  return n >= Vec<float>::width ? load_as(p) : load_as(p, Lanes<float>(n));
}
template <class S>
CONVEXT_INLINE void store_as(S* p, Vec<float> a, int64_t n) {
  n >= Vec<float>::width ? store_as(p, a) : store_as(p, a, Lanes<float>(n));
}
#else
template <class S>
CONVEXT_INLINE Vec<float> load_as(const S* p, int64_t n) {
  if (n >= Vec<float>::width) return load_as(p);
  Halves h{};
  for (int i = 0; i < n; ++i) h[i] = p[i].bits;
  return widen(S{}, h);
}
template <class S>
CONVEXT_INLINE void store_as(S* p, Vec<float> a, int64_t n) {
  if (n >= Vec<float>::width) return store_as(p, a);
  const Halves h = narrow(S{}, a);
  for (int i = 0; i < n; ++i) p[i].bits = h[i];
}
#endif

#define CONVEXT_LOAD_STORE_AS(T)                                                                                       \
  CONVEXT_INLINE Vec<T> load_as(const T* p) { return load(p); }                                                        \
  CONVEXT_INLINE void store_as(T* p, Vec<T> a) { store(p, a); }                                                        \
  CONVEXT_INLINE Vec<T> load_as(const T* p, Lanes<T> lanes) { return load(p, lanes); }                                 \
  CONVEXT_INLINE void store_as(T* p, Vec<T> a, Lanes<T> lanes) { store(p, a, lanes); }                                 \
  CONVEXT_INLINE Vec<T> load_as(const T* p, int64_t n) { return n >= Vec<T>::width ? load(p) : load(p, Lanes<T>(n)); } \
  CONVEXT_INLINE void store_as(T* p, Vec<T> a, int64_t n) {                                                            \
    n >= Vec<T>::width ? store(p, a) : store(p, a, Lanes<T>(n));                                                       \
  }
CONVEXT_LOAD_STORE_AS(float)
CONVEXT_LOAD_STORE_AS(double)
#undef CONVEXT_LOAD_STORE_AS

// One element in the type it is computed in. Not by way of a vector, where that can be helped: to load one from memory
// that has just been written takes longer than all else that is done with an element.
template <class S>
CONVEXT_INLINE compute_t<S> to_compute(S element) {
  if constexpr (std::is_same_v<S, compute_t<S>>) {
    return element;
  } else if constexpr (std::is_same_v<S, BFloat16>) {
    const uint32_t bits = uint32_t{element.bits} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  } else {
    return load_as(&element, 1).v[0];
  }
}

}  // namespace convext::CONVEXT_ISA

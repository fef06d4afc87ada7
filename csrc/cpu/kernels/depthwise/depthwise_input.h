// How the input's channels reach the lanes of a vector of filters k, k + 1, ..., k + W - 1 (filter k reads channel
// k / multiplier): as they lie, as they lie but fewer than W, or spread by the multiplier. Each is built for one k and
// then called with the address of element `k` of a pixel, as if the pixel had a channel for each filter.
#pragma once
#include "cpu/simd/half.h"

namespace convext::CONVEXT_ISA {

template <class T>
struct WholeInput {
  static constexpr bool kWhole = true;
  WholeInput(int64_t, int64_t, int32_t) {}
  CONVEXT_INLINE VecOf<T> operator()(const T* in) const { return load_as(in); }
};

template <class T>
struct PartInput {
  static constexpr bool kWhole = false;
  Lanes<compute_t<T>> lanes;
  PartInput(int64_t, int64_t filters, int32_t) : lanes(filters) {}
  CONVEXT_INLINE VecOf<T> operator()(const T* in) const { return load_as(in, lanes); }
};

template <class T>
struct SpreadInput {
  static constexpr bool kWhole = false;
  static constexpr int kWidth = VecOf<T>::width;
  Lanes<compute_t<T>> lanes;  // filters that exist
  Lanes<compute_t<T>> read;   // channels behind them
  int64_t back;               // from element k to channel k / multiplier
  typename Native<compute_t<T>>::bits index;

  SpreadInput(int64_t k, int64_t filters, int32_t multiplier)
      : lanes(filters),
        read(((k + kWidth < filters ? k + kWidth : filters) - 1) / multiplier - k / multiplier + 1),
        back(k - k / multiplier) {
    for (int i = 0; i < kWidth; ++i) {
      const int64_t channel = (k + i) / multiplier - k / multiplier;
      index[i] = channel < kWidth ? channel : 0;
    }
  }
  CONVEXT_INLINE VecOf<T> operator()(const T* in) const {
    const VecOf<T> x = load_as(in - back, read);
#if defined(__clang__)
    VecOf<T> spread;
    for (int i = 0; i < kWidth; ++i) spread.v[i] = x.v[index[i]];
    return spread;
#else
    return __builtin_shuffle(x.v, index);
#endif
  }
};

}  // namespace convext::CONVEXT_ISA

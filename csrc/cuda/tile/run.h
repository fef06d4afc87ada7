// Runs of neighbouring elements of which a thread has several.
#pragma once
#include "cuda/ptx/global.h"

namespace convext::cuda {

// N neighbouring elements, loaded and stored in one instruction where they are 4, 8 or 16 bytes.
template <class T, int N>
struct alignas(N * sizeof(T)) Run {
  T v[N];
};

template <class T, int N>
CONVEXT_DEVICE Run<T, N> load_run(const T* p) {
  Run<T, N> out;
  if constexpr (sizeof(out) == 16) {
    const uint4 raw = __ldg(reinterpret_cast<const uint4*>(p));
    memcpy(&out, &raw, sizeof raw);
  } else if constexpr (sizeof(out) == 8) {
    const uint2 raw = __ldg(reinterpret_cast<const uint2*>(p));
    memcpy(&out, &raw, sizeof raw);
  } else if constexpr (sizeof(out) == 4) {
    const unsigned raw = __ldg(reinterpret_cast<const unsigned*>(p));
    memcpy(&out, &raw, sizeof raw);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) out.v[i] = __ldg(p + i);
  }
  return out;
}

// The same from shared memory.
template <class T, int N>
CONVEXT_DEVICE Run<T, N> load_shared_run(const T* p) {
  return *reinterpret_cast<const Run<T, N>*>(p);
}

// Where in a row of shared memory column `column` of a value each lies: after every 128 bytes one value is left free.
// Threads with 2, 4 or 8 columns each, which store the first of theirs at once, then the second, meet different banks
// then, and so do threads with one column each.
template <class Acc>
CONVEXT_HD constexpr int spread(int column) {
  return column + column / static_cast<int>(128 / sizeof(Acc));
}

template <class T, int N>
CONVEXT_DEVICE Run<T, N> zero_run() {
  Run<T, N> out;
#pragma unroll
  for (int i = 0; i < N; ++i) out.v[i] = from_accumulate<T>(0);
  return out;
}

template <class T, int N>
CONVEXT_DEVICE void store_run(T* p, const accumulate_t<T> (&v)[N]) {
  Run<T, N> out;
#pragma unroll
  for (int i = 0; i < N; ++i) out.v[i] = from_accumulate<T>(v[i]);
  if constexpr (sizeof(out) == 16) {
    uint4 raw;
    memcpy(&raw, &out, sizeof raw);
    ptx::store_global_16(p, raw);
  } else if constexpr (sizeof(out) == 8) {
    uint2 raw;
    memcpy(&raw, &out, sizeof raw);
    *reinterpret_cast<uint2*>(p) = raw;
  } else if constexpr (sizeof(out) == 4) {
    unsigned raw;
    memcpy(&raw, &out, sizeof raw);
    *reinterpret_cast<unsigned*>(p) = raw;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) p[i] = out.v[i];
  }
}

}  // namespace convext::cuda

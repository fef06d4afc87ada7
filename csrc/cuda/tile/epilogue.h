// The fused epilogue for a run of N output elements, in registers.
#pragma once
#include "run.h"

namespace convext::cuda {

// Which elements: i < count is channel k + i*k_step at y[offset + i*step].
struct Span {
  int32_t k, k_step;
  int64_t offset, step;
  int32_t count;
  bool vector;  // all N lie side by side, and may be read and written kChunk at a time
};

// Elements of a span of N that move in one instruction: 16 bytes at most.
template <class T, int N>
constexpr int kChunk = N < Vector<T>::kSize ? N : Vector<T>::kSize;

// A value for each of the N elements out of an array by channel: 16 bytes a load where the run lies so in memory.
template <class Acc, int N>
CONVEXT_DEVICE void load_channels(const void* array, const Span& span, Acc (&into)[N]) {
  const Acc* from = static_cast<const Acc*>(array) + span.k;
  constexpr int CHUNK = kChunk<Acc, N>;
  if (N > 1 && span.k_step == 1 && span.count >= N && reinterpret_cast<uintptr_t>(from) % (CHUNK * sizeof(Acc)) == 0) {
#pragma unroll
    for (int i = 0; i < N; i += CHUNK) {
      const Run<Acc, CHUNK> run = load_run<Acc, CHUNK>(from + i);
#pragma unroll
      for (int j = 0; j < CHUNK; ++j) into[i + j] = run.v[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) into[i] = i < span.count ? __ldg(from + i * span.k_step) : Acc(0);
  }
}

template <class T, int N>
CONVEXT_DEVICE void add_residual(const Epilogue& epilogue, accumulate_t<T> (&v)[N], const Span& span) {
  using Acc = accumulate_t<T>;
  if (!epilogue.residual) return;
  const T* residual = static_cast<const T*>(epilogue.residual) + span.offset;
  if (span.vector) {
    constexpr int CHUNK = kChunk<T, N>;
#pragma unroll
    for (int i = 0; i < N; i += CHUNK) {
      const Run<T, CHUNK> r = load_run<T, CHUNK>(residual + i);
#pragma unroll
      for (int j = 0; j < CHUNK; ++j) v[i + j] += to_accumulate(r.v[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] += i < span.count ? to_accumulate(__ldg(residual + i * span.step)) : Acc(0);
  }
}

template <class Acc, int N>
CONVEXT_DEVICE void activate(const Epilogue& epilogue, Acc (&v)[N]) {
  visit_activation<Acc>(epilogue.activation, [&](auto activation) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = activation.forward(v[i]);
  });
}

// All of it. v[i] is the accumulator of element i and becomes its value in y.
template <class T, int N>
CONVEXT_DEVICE void apply_epilogue(const Epilogue& epilogue, accumulate_t<T> (&v)[N], const Span& span) {
  using Acc = accumulate_t<T>;
  if (epilogue.scale) {
    Acc scale[N];
    load_channels(epilogue.scale, span, scale);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] *= scale[i];
  }
  if (epilogue.shift) {
    Acc shift[N];
    load_channels(epilogue.shift, span, shift);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] += shift[i];
  }
  add_residual<T>(epilogue, v, span);
  activate(epilogue, v);
}

// Writes the run to y.
template <class T, int N>
CONVEXT_DEVICE void store_span(T* y, const accumulate_t<T> (&v)[N], const Span& span) {
  T* out = y + span.offset;
  if (span.vector) {
    constexpr int CHUNK = kChunk<T, N>;
#pragma unroll
    for (int i = 0; i < N; i += CHUNK) {
      accumulate_t<T> chunk[CHUNK];
#pragma unroll
      for (int j = 0; j < CHUNK; ++j) chunk[j] = v[i + j];
      store_run<T, CHUNK>(out + i, chunk);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < span.count) out[i * span.step] = from_accumulate<T>(v[i]);
    }
  }
}

}  // namespace convext::cuda

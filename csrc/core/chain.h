// Elementwise operations, one after the other on a running value z, each with at most one operand b: what stands behind
// a convolution and is none of its epilogue (epilogue.h). T is float, double or a vector of them, as there.
//
// A new operation is a name in CONVEXT_CHAIN_OPERATIONS and a case in `apply`, in `gradient` and, where its operand is a
// tensor, in `operand_gradient`.
#pragma once
#include "epilogue.h"

namespace convext {

// X(name): the order is the numbering, which Python reads from the library. The first ones take an operand, which
// leaky_relu's slope and elu's alpha are, too; `keep` leaves z as it is (chain.h of the CPU's kernels says what it does).
// clamp's and hardtanh's bounds compute what minimum and maximum do; their gradients differ where z is at the bound.
// clang-format off
#define CONVEXT_CHAIN_OPERATIONS(X)                                                         \
  X(add) X(sub) X(rsub) X(mul) X(div) X(minimum) X(maximum) X(leaky_relu) X(elu)            \
  X(clamp_min) X(clamp_max) X(hardtanh_min) X(hardtanh_max)                                 \
  X(keep)                                                                                   \
  X(relu) X(silu) X(hardswish) X(gelu) X(gelu_tanh) X(mish) X(sigmoid) X(hardsigmoid)       \
  X(tanh) X(softplus)
// clang-format on

enum class ChainOperation : int32_t {
#define CONVEXT_X(name) name,
  CONVEXT_CHAIN_OPERATIONS(CONVEXT_X)
#undef CONVEXT_X
};

namespace chain {

using activation::where;
using std::exp;

template <class T>
CONVEXT_HD T magnitude(T z) {
  return where(z < T(0), -z, z);
}

// tanh(z) / z = p(z^2) for |z| < 0.63, a fit at Chebyshev nodes with a relative error of 1.2e-8 in float; beyond,
// 1 - 2 / (exp(2 |z|) + 1), which is 0.55 and more, so that its rounding is that of a float near one. NaN passes.
template <class T>
CONVEXT_HD T tanh(T z) {
  const T a = magnitude(z), square = z * z;
  T p = T(-5.599785035e-03);
  p = p * square + T(2.053697200e-02);
  p = p * square + T(-5.370427744e-02);
  p = p * square + T(1.333091717e-01);
  p = p * square + T(-3.333325145e-01);
  const T small = z * (T(1) + square * p);  // keeps the sign of a zero
  const T large = T(1) - T(2) / (exp(a + a) + T(1));
  return where(a < T(0.63), small, where(z < T(0), -large, large));
}

// exp(z) - 1 = 2 t / (1 - t) with t = tanh(z / 2), for z <= 0, where nothing cancels: t is in (-1, 0].
template <class T>
CONVEXT_HD T expm1_of_negative(T z) {
  const T t = tanh(T(0.5) * z);
  return T(2) * t / (T(1) - t);
}

// log(1 + exp(z)) = max(z, 0) + log1p(u), u = exp(-|z|), and log1p(u) = 2 atanh(s), s = u / (2 + u) <= 1/3, whose
// series in s^2 is a fit at Chebyshev nodes with a relative error of 1e-9.
template <class T>
CONVEXT_HD T softplus(T z) {
  const T u = exp(-magnitude(z)), s = u / (T(2) + u), square = s * s;
  T p = T(1.219695401e-01);
  p = p * square + T(1.069928027e-01);
  p = p * square + T(1.431010370e-01);
  p = p * square + T(1.999935562e-01);
  p = p * square + T(3.333333951e-01);
  const T log1p = T(2) * (s + s * square * p);
  return where(z < T(0), log1p, z + log1p);
}

// z tanh(softplus(z)) = z n / (n + 2), n = u (u + 2), u = exp(z) (Misra, 2019): no logarithm, nothing cancels. From 20
// on the factor rounds to one, also in double to within 1e-17.
template <class T>
CONVEXT_HD T mish(T z) {
  const T u = exp(where(z > T(20), T(20), z)), n = u * (u + T(2));
  return z * (n / (n + T(2)));
}

// z times the logistic function of 2 sqrt(2 / pi) (z + 0.044715 z^3), which is (1 + tanh) / 2 of half of it.
template <class T>
CONVEXT_HD T gelu_tanh(T z) {
  const T inner = T(-1.5957691216057308) * (z + T(0.044715) * z * z * z);
  return z / (T(1) + exp(inner));
}

template <class T>
CONVEXT_HD T hardsigmoid(T z) {
  const T shifted = z + T(3);
  return where(shifted < T(0), T(0), where(shifted > T(6), T(6), shifted)) / T(6);
}

// The operation `which` on z. minimum and maximum let a NaN in either pass, as torch's do.
template <ChainOperation which, class T>
CONVEXT_HD T apply(T z, T b) {
  using Op = ChainOperation;
  if constexpr (which == Op::add) return z + b;
  if constexpr (which == Op::sub) return z - b;
  if constexpr (which == Op::rsub) return b - z;
  if constexpr (which == Op::mul) return z * b;
  if constexpr (which == Op::div) return z / b;
  if constexpr (which == Op::minimum || which == Op::clamp_max || which == Op::hardtanh_max) {
    return where(z <= b, z, where(b <= z, b, z + b));
  }
  if constexpr (which == Op::maximum || which == Op::clamp_min || which == Op::hardtanh_min) {
    return where(z >= b, z, where(b >= z, b, z + b));
  }
  if constexpr (which == Op::leaky_relu) return where(z > T(0), z, z * b);
  if constexpr (which == Op::elu) return where(z > T(0), z, b * expm1_of_negative(where(z > T(0), T(0), z)));
  if constexpr (which == Op::keep) return z;
  if constexpr (which == Op::relu) return activation::relu<T>::forward(z);
  if constexpr (which == Op::silu) return activation::silu<T>::forward(z);
  if constexpr (which == Op::hardswish) return activation::hardswish<T>::forward(z);
  if constexpr (which == Op::gelu) return activation::gelu<T>::forward(z);
  if constexpr (which == Op::gelu_tanh) return gelu_tanh(z);
  if constexpr (which == Op::mish) return mish(z);
  if constexpr (which == Op::sigmoid) return T(1) / (T(1) + exp(-z));
  if constexpr (which == Op::hardsigmoid) return hardsigmoid(z);
  if constexpr (which == Op::tanh) return tanh(z);
  if constexpr (which == Op::softplus) return softplus(z);
}

// mish'(z) = t + z s (1 - t^2) with t = tanh(softplus(z)) = n / (n + 2) as above, 1 - t^2 = 4 (n + 1) / (n + 2)^2, and
// s = u / (1 + u) the logistic function.
template <class T>
CONVEXT_HD T mish_gradient(T z) {
  const T u = exp(where(z > T(20), T(20), z)), n = u * (u + T(2)), rest = T(1) / (n + T(2));
  return n * rest + z * (u / (T(1) + u)) * (T(4) * (n + T(1)) * rest * rest);
}

// s + z s (1 - s) a'(z), where s is the logistic function of a(z) = 2 sqrt(2 / pi) (z + 0.044715 z^3).
template <class T>
CONVEXT_HD T gelu_tanh_gradient(T z) {
  const T square = z * z, slope = T(1.5957691216057308) * (T(1) + T(0.134145) * square);
  const T s = T(1) / (T(1) + exp(T(-1.5957691216057308) * (z + T(0.044715) * z * square)));
  return s + z * s * (T(1) - s) * slope;
}

// What arrives at z where g arrives at out = apply<which>(z, b), as PyTorch's backward passes have it: at ties minimum
// and maximum halve it, clamp's bounds let it pass and hardtanh's do not; a NaN compares as it does in their vectors. relu, sigmoid
// and tanh go by `out` alone, and so may leaky_relu with b >= 0 and hardtanh's bounds, with `out` in the place of z:
// each is on the same side of 0, or of its bound, as z.
template <ChainOperation which, class T>
CONVEXT_HD T gradient(T z, T out, T b, T g) {
  using Op = ChainOperation;
  const T zero(0);
  if constexpr (which == Op::add || which == Op::sub || which == Op::keep) return g;
  if constexpr (which == Op::rsub) return -g;
  if constexpr (which == Op::mul) return g * b;
  if constexpr (which == Op::div) return g / b;
  if constexpr (which == Op::minimum) return where(z > b, zero, where((z <= b) & (b <= z), T(0.5) * g, g));
  if constexpr (which == Op::maximum) return where(z < b, zero, where((z <= b) & (b <= z), T(0.5) * g, g));
  if constexpr (which == Op::clamp_min) return where(z >= b, g, zero);
  if constexpr (which == Op::clamp_max) return where(z <= b, g, zero);
  if constexpr (which == Op::hardtanh_min) return where(z > b, g, zero);
  if constexpr (which == Op::hardtanh_max) return where(z < b, g, zero);
  if constexpr (which == Op::leaky_relu) return where(z > zero, g, g * b);
  if constexpr (which == Op::elu) return where(z > zero, g, g * b * exp(where(z > zero, zero, z)));
  if constexpr (which == Op::relu) return where(out <= zero, zero, g);
  if constexpr (which == Op::silu) return g * activation::silu<T>::derivative(z);
  if constexpr (which == Op::hardswish) {
    return where(z <= T(-3), zero, where(z >= T(3), g, g * (z / T(3) + T(0.5))));
  }
  if constexpr (which == Op::gelu) return g * activation::gelu<T>::derivative(z);
  if constexpr (which == Op::gelu_tanh) return g * gelu_tanh_gradient(z);
  if constexpr (which == Op::mish) return g * mish_gradient(z);
  if constexpr (which == Op::sigmoid) return g * (T(1) - out) * out;
  if constexpr (which == Op::hardsigmoid) return where((z > T(-3)) & (z < T(3)), g / T(6), zero);
  if constexpr (which == Op::tanh) return g * (T(1) - out * out);
  if constexpr (which == Op::softplus) return where(z > T(20), g, g / (T(1) + exp(-z)));
}

// What arrives at the operand, before it is summed up over all that it was broadcast to. Of clamp's and hardtanh's
// bounds and elu's alpha there are no tensors.
template <ChainOperation which, class T>
CONVEXT_HD T operand_gradient(T z, T b, T g) {
  using Op = ChainOperation;
  const T zero(0);
  if constexpr (which == Op::add || which == Op::rsub) return g;
  if constexpr (which == Op::sub) return -g;
  if constexpr (which == Op::mul) return g * z;
  if constexpr (which == Op::div) return -g * (z / b / b);
  if constexpr (which == Op::minimum) return where(z < b, zero, where((z <= b) & (b <= z), T(0.5) * g, g));
  if constexpr (which == Op::maximum) return where(z > b, zero, where((z <= b) & (b <= z), T(0.5) * g, g));
  if constexpr (which == Op::leaky_relu) return where(z > zero, zero, g * z);
  return zero;
}

}  // namespace chain
}  // namespace convext

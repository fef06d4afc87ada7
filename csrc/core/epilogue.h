// What happens to an output element between the accumulator and memory, one definition for the CPU and CUDA:
//
//   out = activation(accumulator * scale[k] + shift[k] + residual)
//
// scale and shift stand for a bias, for a batch norm in inference, or for both; each part may be absent.
// A new activation is a name in CONVEXT_ACTIVATIONS and a struct: forward, derivative, and whether that derivative is
// `costly`, more than a pass over memory.
#pragma once
#include <cmath>
#include <cstdint>

#include "conv_problem.h"

namespace convext {

// X(name): the order is the numbering, which Python reads from the library (tested equal).
#define CONVEXT_ACTIVATIONS(X) X(identity) X(relu) X(relu6) X(silu) X(hardswish) X(gelu)

enum class Activation : int32_t {
#define CONVEXT_X(name) name,
  CONVEXT_ACTIVATIONS(CONVEXT_X)
#undef CONVEXT_X
};

struct Epilogue {
  const void* scale = nullptr;     // (K) in the accumulate dtype, or nullptr for 1
  const void* shift = nullptr;     // (K) in the accumulate dtype, or nullptr for 0
  const void* residual = nullptr;  // shape, dtype and layout of y, or nullptr for 0
  Activation activation = Activation::identity;
};

// T is float, double or a vector of them (vec.h): comparisons choose through where(), so that one definition serves
// all. NaN passes through every one of them, as it does in PyTorch.
namespace activation {

using std::erf;
using std::exp;

template <class T>
CONVEXT_HD T where(bool condition, T a, T b) {
  return condition ? a : b;
}

template <class T>
struct identity {
  static constexpr bool costly = false;
  CONVEXT_HD static T forward(T z) { return z; }
  CONVEXT_HD static T derivative(T) { return T(1); }
};

template <class T>
struct relu {
  static constexpr bool costly = false;
  CONVEXT_HD static T forward(T z) { return where(z < T(0), T(0), z); }
  CONVEXT_HD static T derivative(T z) { return where(z <= T(0), T(0), T(1)); }
};

template <class T>
struct relu6 {
  static constexpr bool costly = false;
  CONVEXT_HD static T forward(T z) { return where(z < T(0), T(0), where(z > T(6), T(6), z)); }
  CONVEXT_HD static T derivative(T z) { return where((z <= T(0)) | (z >= T(6)), T(0), T(1)); }
};

template <class T>
struct silu {
  static constexpr bool costly = true;
  CONVEXT_HD static T forward(T z) { return z / (T(1) + exp(-z)); }
  CONVEXT_HD static T derivative(T z) {
    const T sigmoid = T(1) / (T(1) + exp(-z));
    return sigmoid * (T(1) + z * (T(1) - sigmoid));
  }
};

template <class T>
struct hardswish {
  static constexpr bool costly = false;
  CONVEXT_HD static T forward(T z) {
    const T gate = where(z + T(3) < T(0), T(0), where(z + T(3) > T(6), T(6), z + T(3)));
    return z * gate / T(6);
  }
  CONVEXT_HD static T derivative(T z) { return where(z <= T(-3), T(0), where(z < T(3), z / T(3) + T(0.5), T(1))); }
};

// P(X <= z) of a standard normal X. A vector type may bring one of its own.
template <class T>
CONVEXT_HD T normal_cdf(T z) {
  return T(0.5) * (T(1) + erf(z * T(0.70710678118654752440)));
}

// The exact form, z P(X <= z): torch.nn.GELU's default, not the tanh approximation.
template <class T>
struct gelu {
  static constexpr bool costly = true;
  CONVEXT_HD static T forward(T z) { return z * normal_cdf(z); }
  CONVEXT_HD static T derivative(T z) {
    const T pdf = T(0.39894228040143267794) * exp(T(-0.5) * z * z);
    return normal_cdf(z) + z * pdf;
  }
};

}  // namespace activation

// Calls visit(activation::name<T>{}) for the activation at run time: the switch stands outside the loops.
template <class T, class Visitor>
CONVEXT_HD inline auto visit_activation(Activation which, Visitor&& visit) {
  switch (which) {
#define CONVEXT_X(name) \
  case Activation::name: return visit(activation::name<T>{});
    CONVEXT_ACTIVATIONS(CONVEXT_X)
#undef CONVEXT_X
  }
  return visit(activation::identity<T>{});
}

}  // namespace convext

// Squeeze and excitation (Hu, Shen and Sun, 2018) over an NHWC image: each channel is scaled by a gate that two small
// matrix products compute from all channels' means,
//
//   gate = g(W2 act(W1 mean(x) + b1) + b2)          y[p, q, c] = x[p, q, c] * gate[c]
//
// The pieces, for a caller that has the image in its cache strip by strip: sums of a row as it comes out of the layer
// before, the gates once all rows are known, and the scaling just before the layer after reads the row.
#pragma once
#include "core/isa_table.h"

namespace convext {

// X(name): the order is the numbering, which Python reads from the library.
#define CONVEXT_GATES(X) X(sigmoid) X(hardsigmoid)

enum class Gate : int32_t {
#define CONVEXT_X(name) name,
  CONVEXT_GATES(CONVEXT_X)
#undef CONVEXT_X
};

struct Excite {
  const float *w1, *b1;  // (squeezed, c) and (squeezed); b1 may be nullptr
  const float *w2, *b2;  // (c, squeezed) and (c); b2 may be nullptr
  int32_t c, squeezed;
  Activation activation;  // between the two products
  Gate gate;
};

struct SqueezeExcite {
  // sums[c] = sum over `pixels` neighbouring pixels of x.
  void (*sums)(const float* x, int64_t pixels, int32_t c, float* sums);

  // The gates of one image from `rows` rows of sums, over `pixels` pixels in all. `scratch` holds c + squeezed floats.
  void (*gates)(const Excite&, const float* sums, int64_t rows, int64_t pixels, float* gates, float* scratch,
                const Parallel&);

  // x[i, c] *= gates[c] over `pixels` pixels.
  void (*scale)(float* x, int64_t pixels, int32_t c, const float* gates);
};

CONVEXT_ISA_TABLE(SqueezeExcite, squeeze_excite)

}  // namespace convext

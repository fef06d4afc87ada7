// fprop of groups of few channels, and dgrad at unit stride, which is fprop of the mirrored problem.
#pragma once
#include "grouped.h"

namespace convext::CONVEXT_ISA {

// Weights as run_grouped reads them: [vector of filters][r][s][c][lane], zeros in lanes past the last filter.
inline int64_t grouped_packed_size(const ConvProblem& p) {
  const int64_t width = Vec<float>::width;
  return (p.k + width - 1) / width * width * p.r * p.s * p.c_per_group() * static_cast<int64_t>(sizeof(float));
}

// y = epilogue(x * w) over NHWC.
void run_grouped(const ConvProblem&, const float* x, const float* packed, float* y, const Epilogue&, const Parallel&);

}  // namespace convext::CONVEXT_ISA

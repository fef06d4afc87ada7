// What the CUDA kernels' cost models share. A cost is in clock cycles of one launch on an idle GPU of the Hopper class;
// it compares variants with one another and with a copy, and is no prediction of time. Each family's stands beside its
// kernels.
#pragma once
#include <algorithm>
#include <cstring>

#include "core/variant.h"

namespace convext::cuda {

// Of the largest GPU in use, an H100 or H200.
constexpr int64_t kProcessors = 132;

// One multiprocessor, per clock: what the data sheets of A100 and H100 agree on to within the model's precision.
constexpr double kMemoryBytes = 20;  // of global memory, its share
constexpr double kCacheBytes = 64;   // from the second-level cache
constexpr double kFp32Fma = 128;     // multiply-adds
constexpr double kFp64Fma = 64;
// Multiply-adds of the tensor cores through mma.sync, which reaches 62 % of an H100's 2048 (convext/bench/sass.py names
// the source).
constexpr double kHalfMma = 0.62 * 2048, kTf32Mma = kHalfMma / 2;
// Estimates, of an order of magnitude alone, until a GPU times them.
constexpr double kLaunch = 4000;         // cycles of a grid, until its first result
constexpr double kBlockOverhead = 1500;  // cycles to fill and drain one block's pipeline

// What the compiler made of a kernel: cycles of a multiprocessor that a block's step of the main loop takes to issue
// and in shared memory, and how many blocks a multiprocessor holds. A kernel that is rebuilt is ranked anew by itself.
struct MachineCode {
  const char* variant;
  double issue, shared;
  int blocks;
};

inline MachineCode machine_code_of(const Variant& v) {
  static constexpr MachineCode kCodes[] = {
#define CONVEXT_MACHINE_CODE(variant, issue, shared, blocks) {#variant, issue, shared, blocks},
#include "machine_code.inc"
  };
  for (const MachineCode& code : kCodes) {
    if (std::strcmp(code.variant, v.name) == 0) return code;
  }
  return {v.name, 0, 0, 1};
}

inline double ceil_ratio(double a, double b) { return static_cast<double>(static_cast<int64_t>((a + b - 1) / b)); }

// A kernel that copies `bytes` from one memory order to another.
inline double copy_cost(double bytes) { return kLaunch + 2 * bytes / (kProcessors * kMemoryBytes); }

// Reading the input and writing the output.
inline double traffic_cost(const ConvProblem& p) {
  return double(p.x_size() + p.y_size()) * dtype_size(p.dtype) / (kProcessors * kMemoryBytes);
}

// A matrix-product kernel of `multiply_adds` a clock: blocks on the busiest multiprocessor, times what one of them
// takes of whatever its steps are bound by; filling and draining is paid once for all that are there at a time.
// `classes`: parts that the rows are in, which share the reduction between them and have tiles of their own.
inline double tiled_cost(const Variant& v, const ConvProblem& p, double multiply_adds, double classes) {
  const GemmShape g = p.gemm_shape(v.pass);
  const double bytes = static_cast<double>(dtype_size(p.dtype));
  double tiles = classes * ceil_ratio(g.m / classes, v.block_m) * ceil_ratio(double(g.n), v.block_n) * p.groups;
  double steps = std::max(1.0, ceil_ratio(double(g.k), v.block_k) / classes);
  double extra = 0;
  if (v.pass == Pass::kWgrad) {
    const double slabs = static_cast<double>(v.workspace(p, 1));
    const double splits = std::max(1.0, slabs / (double(p.w_size()) * dtype_size(p.accumulate_dtype())));
    tiles *= splits;
    steps = ceil_ratio(steps, splits);
    extra = kLaunch + 2 * slabs / (kProcessors * kCacheBytes);
  }
  const double area = double(v.block_m) * v.block_n;
  const double multiply = area * v.block_k / multiply_adds;
  const double filled = (v.block_m + v.block_n) * v.block_k * bytes;
  const MachineCode code = machine_code_of(v);
  const double step = std::max({multiply, filled / kCacheBytes, code.issue, code.shared});
  const double blocks = ceil_ratio(tiles, kProcessors), rounds = ceil_ratio(blocks, code.blocks);
  const double busy = blocks * steps * step + rounds * (area * bytes / kMemoryBytes + kBlockOverhead);
  return kLaunch + std::max(traffic_cost(p), busy + extra);
}

}  // namespace convext::cuda

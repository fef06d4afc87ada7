#include "select_cuda.h"

#include <algorithm>
#include <cstring>

namespace convext {
namespace {

// One multiprocessor, per clock: what the data sheets of A100 and H100 agree on to within the model's precision.
constexpr double kProcessors = 132;
constexpr double kMemoryBytes = 20;     // of global memory, its share
constexpr double kCacheBytes = 64;      // from the second-level cache
constexpr double kHalfMma = 1024;       // multiply-adds, bf16 and fp16
constexpr double kTf32Mma = 512;
constexpr double kFp32Fma = 128;
constexpr double kFp64Fma = 64;
constexpr double kLaunch = 4000;        // of a grid, until its first result
constexpr double kBlockOverhead = 1500; // fill and drain of one block's pipeline
constexpr double kGather = 4;           // loading element by element against 16 bytes at a time

double ceil_ratio(double a, double b) { return static_cast<double>(static_cast<int64_t>((a + b - 1) / b)); }

bool has(const Variant& variant, const char* part) { return std::strstr(variant.name, part) != nullptr; }

double multiply_adds(const Variant& variant) {
  if (has(variant, "_simt_")) return variant.dtype == DType::kFloat64 ? kFp64Fma : kFp32Fma;
  return variant.dtype == DType::kFloat32 ? kTf32Mma : kHalfMma;
}

// A matrix-product kernel: blocks on the busiest multiprocessor, times what one of them takes.
double tiled_cost(const Variant& variant, const ConvProblem& p) {
  const GemmShape g = p.gemm_shape(variant.pass);
  const double bytes = static_cast<double>(dtype_size(p.dtype));
  double tiles = ceil_ratio(double(g.m), variant.block_m) * ceil_ratio(double(g.n), variant.block_n) * p.groups;
  double steps = ceil_ratio(double(g.k), variant.block_k);
  double extra = 0;
  if (variant.pass == Pass::kDgrad && !has(variant, "_simt_")) {
    // Residue classes share the taps between them, and each has its own tiles.
    const double classes = double(p.stride_h) * p.stride_w;
    tiles = classes * ceil_ratio(g.m / classes, variant.block_m) * ceil_ratio(double(g.n), variant.block_n) * p.groups;
    steps = std::max(1.0, steps / classes);
  }
  if (variant.pass == Pass::kWgrad && variant.workspace) {
    const double slabs = static_cast<double>(variant.workspace(p, 1));
    const double splits = std::max(1.0, slabs / (double(p.w_size()) * (p.dtype == DType::kFloat64 ? 8 : 4)));
    tiles *= splits;
    steps = ceil_ratio(steps, splits);
    extra = kLaunch + 2 * slabs / (kProcessors * kCacheBytes);
  }
  const double area = double(variant.block_m) * variant.block_n;
  const double multiply = area * variant.block_k / multiply_adds(variant);
  const bool gathers = has(variant, "_gather_") || has(variant, "_simt_");
  const double filled = (variant.block_m + variant.block_n) * variant.block_k * bytes;
  const double load = filled / kCacheBytes * (gathers ? kGather : 1);
  const double block = steps * std::max(multiply, load) + area * bytes / kMemoryBytes + kBlockOverhead;
  return ceil_ratio(tiles, kProcessors) * block + extra;
}

}  // namespace

double cuda_copy_cost(double bytes) { return kLaunch + 2 * bytes / (kProcessors * kMemoryBytes); }

double cuda_cost(const Variant& variant, const ConvProblem& p) {
  const double traffic = double(p.x_size() + p.y_size()) * dtype_size(p.dtype) / (kProcessors * kMemoryBytes);
  if (variant.block_m == 0) {  // depthwise: memory decides for `window` and `planes`, instructions for `any`
    const double instructions = p.flops() / 2 * 8 / (kProcessors * kFp32Fma);
    const bool any = has(variant, "_any_");
    return kLaunch + (any ? std::max(2 * traffic, instructions) : traffic);
  }
  return kLaunch + std::max(traffic, tiled_cost(variant, p));
}

}  // namespace convext

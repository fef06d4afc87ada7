#include "select.h"

#include <algorithm>

#if defined(CONVEXT_CUDA_LIBRARY)
#include "select_cuda.h"
#endif

namespace convext {

// Kernels define their Variant as `extern const` at namespace convext scope. This file is compiled once for each of the
// two libraries, and each knows its own kernels.
#if defined(CONVEXT_CUDA_LIBRARY)
#define CONVEXT_CUDA_VARIANT(base) extern const Variant base;
#elif defined(CONVEXT_HAVE_X86_ISAS)
#define CONVEXT_CPU_VARIANT(base) extern const Variant base##_portable, base##_avx2, base##_avx512;
#else
#define CONVEXT_CPU_VARIANT(base) extern const Variant base##_portable;
#endif
#include "variants.inc"

const std::vector<const Variant*>& variants() {
  static const std::vector<const Variant*> all = {
#if defined(CONVEXT_CUDA_LIBRARY)
#define CONVEXT_CUDA_VARIANT(base) &base,
#elif defined(CONVEXT_HAVE_X86_ISAS)
#define CONVEXT_CPU_VARIANT(base) &base##_portable, &base##_avx2, &base##_avx512,
#else
#define CONVEXT_CPU_VARIANT(base) &base##_portable,
#endif
#include "variants.inc"
  };
  return all;
}

Isa detect_cpu_isa() {
#if defined(CONVEXT_HAVE_X86_ISAS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return Isa::kAVX512;
  if (avx2) return Isa::kAVX2;
#endif
  return Isa::kPortable;
}

Settings& settings() {
  static Settings current{detect_cpu_isa(), true, true};
  return current;
}

namespace {

bool is_algo(const Variant& variant, const char* algo) { return std::string(variant.algo) == algo; }

// The dtype a CPU kernel computes in: halves are staged through float32 (csrc/cpu/staging.h).
DType compute_dtype(Device device, DType dtype) {
  return device == Device::kCPU && dtype != DType::kFloat64 ? DType::kFloat32 : dtype;
}

// Share of the filter taps that meet the image rather than the padding, averaged over the outputs. Dilated kernels
// skip the others.
double in_bounds_share(int32_t out, int32_t taps, int32_t stride, int32_t pad, int32_t dil, int32_t size) {
  if (out <= 0 || taps <= 0) return 1.0;
  int64_t inside = 0;
  for (int32_t t = 0; t < taps; ++t) {
    // 0 <= o*stride - pad + t*dil < size
    const int32_t shift = t * dil - pad;
    const int32_t first = shift >= 0 ? 0 : (-shift + stride - 1) / stride;
    const int32_t last = size - 1 - shift < 0 ? -1 : std::min(out - 1, (size - 1 - shift) / stride);
    inside += std::max(0, last - first + 1);
  }
  return static_cast<double>(inside) / (static_cast<double>(out) * taps);
}

}  // namespace

const char* reject(const Variant& variant, Device device, Pass pass, const ConvProblem& problem) {
  if (variant.device != device || variant.pass != pass) return "it serves another device or pass";
  if (variant.dtype != compute_dtype(device, problem.dtype)) return "it computes in another dtype";
  if (device == Device::kCPU && variant.isa > settings().cpu_isa) {
    return "this CPU, or the current setting, does not offer its instruction set";
  }
  if (!settings().winograd && is_algo(variant, "winograd")) return "the accuracy setting rules Winograd out";
  if (!settings().tf32 && std::string(variant.name).find("_tf32_") != std::string::npos) {
    return "rounding to tf32 is not allowed";
  }
  return variant.reject ? variant.reject(problem) : nullptr;
}

double cost(const Variant& variant, const ConvProblem& problem) {
#if defined(CONVEXT_CUDA_LIBRARY)
  return cuda_cost(variant, problem);
#else
  // A family's typical time per multiply-add relative to the direct kernel's; narrower vectors cost in proportion.
  double per_flop = 1.0;
  if (is_algo(variant, "depthwise")) {
    per_flop = 0.1;  // the direct kernel computes one channel a group: a vector's other lanes are wasted
  } else if (is_algo(variant, "dilated")) {
    const double share =
        in_bounds_share(problem.p(), problem.r, problem.stride_h, problem.pad_h, problem.dil_h, problem.h) *
        in_bounds_share(problem.q(), problem.s, problem.stride_w, problem.pad_w, problem.dil_w, problem.w);
    per_flop = 0.02 + share;
  } else if (is_algo(variant, "winograd")) {
    // F(4x4, 3x3) needs 36 multiplications where the direct form needs 144, plus the transforms, whose share falls
    // with the channels; the last tile of a row is only partly used. The transformed weights are four times larger,
    // and with few tiles reading them is what takes the time: 2 FLOP go by for a byte from the third-level cache,
    // 6 for one from memory.
    const double used = (double(problem.p()) / ((problem.p() + 3) / 4 * 4)) *
                        (double(problem.q()) / ((problem.q() + 3) / 4 * 4));
    const double channels = double(problem.c) * problem.k / (double(problem.c) + problem.k);
    const double weight_bytes = 36.0 * 4 * problem.c * problem.k;
    const double reading = weight_bytes * (weight_bytes > 24e6 ? 6 : 2) / std::max(problem.flops(), 1.0);
    per_flop = 0.25 / std::max(used, 0.05) * (1.0 + 12.0 / std::max(channels, 1.0)) + 0.05 + reading;
  }
  const double width = variant.isa == Isa::kAVX512 ? 1.0 : variant.isa == Isa::kAVX2 ? 2.0 : 6.0;
  return problem.flops() * per_flop * width;
#endif
}

int select(Device device, Pass pass, const ConvProblem& problem) {
  int best = -1;
  double best_cost = 0;
  const auto& all = variants();
  for (int i = 0; i < static_cast<int>(all.size()); ++i) {
    if (reject(*all[i], device, pass, problem)) continue;
    const double c = cost(*all[i], problem);
    if (best < 0 || c < best_cost) best = i, best_cost = c;
  }
  return best;
}

std::vector<std::pair<std::string, std::string>> reject_reasons(Device device, Pass pass, const ConvProblem& problem) {
  std::vector<std::pair<std::string, std::string>> reasons;
  for (const Variant* variant : variants()) {
    if (variant->device != device || variant->pass != pass) continue;
    if (const char* why = reject(*variant, device, pass, problem)) reasons.emplace_back(variant->name, why);
  }
  return reasons;
}

}  // namespace convext

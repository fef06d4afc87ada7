#include "select.h"

#include <algorithm>

#if defined(CONVEXT_CUDA_LIBRARY)
#include "cuda/select_cuda.h"
#endif

namespace convext {

// Kernels define their Variant as `extern const` at namespace convext scope. This file is compiled once for each of the
// two libraries, and each knows its own kernels.
#if defined(CONVEXT_CUDA_LIBRARY)
#define CONVEXT_CUDA_VARIANT(base) extern const Variant base;
#elif defined(CONVEXT_HAVE_X86_ISAS)
#define CONVEXT_CPU_VARIANT(base) extern const Variant base##_portable, base##_avx2, base##_avx512;
#define CONVEXT_CPU_BF16_VARIANT(base) extern const Variant base##_avx512_bf16;
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
#define CONVEXT_CPU_BF16_VARIANT(base) &base##_avx512_bf16,
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
  if (avx2 && avx512) return __builtin_cpu_supports("avx512bf16") ? Isa::kAVX512BF16 : Isa::kAVX512;
  if (avx2) return Isa::kAVX2;
#endif
  return Isa::kPortable;
}

Settings& settings() {
  static Settings current{detect_cpu_isa(), Accuracy::kFast, true};
  return current;
}

namespace {

bool is_algo(const Variant& variant, const char* algo) { return std::string(variant.algo) == algo; }

// The outputs along an axis of the tile of a Winograd kernel, 0 of any other.
int32_t winograd_tile(const Variant& variant) {
  for (int32_t m : {2, 3, 4}) {
    const std::string size = std::to_string(m);
    if (is_algo(variant, ("winograd" + size + "x" + size).c_str())) return m;
  }
  return 0;
}

// Whether a kernel serves problems of the dtype: its own, or on the CPU halves staged through float32 (cpu/staging.h).
bool serves(const Variant& variant, DType dtype) {
  if (variant.dtype == dtype) return true;
  return variant.device == Device::kCPU && variant.dtype == DType::kFloat32 && dtype_size(dtype) == 2;
}

constexpr double kTransforms = 2.5;  // measured: time of Winograd's, times channels, over the direct kernel's

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

// Outputs along an axis over those of the tiles that cover it, of m outputs a dilation apart.
double tiled_share(int32_t out, int32_t dil, int32_t m) {
  if (out <= 0) return 1.0;
  const int32_t phases = std::min(out, dil), longest = (out + dil - 1) / dil;
  return static_cast<double>(out) / (static_cast<double>(phases) * ((longest + m - 1) / m) * m);
}

// Winograd's F(m x m, 3 x 3): (m+2)^2 multiplications where the direct form needs 9 m^2; a fixed time for the
// transforms, which weighs less with more channels; and reading the transformed weights, which are (m+2)^2 / 9 times
// larger and come from memory while 6 FLOP go by for a byte: with few tiles that takes longer than the multiplications.
// dgrad runs in training, where the weights are new at every call and their transform counts: 50 FLOP an element more
// than the direct form's packing. wgrad transforms its sums back instead.
double winograd_per_flop(const ConvProblem& p, Pass pass, int32_t m) {
  const bool fprop = pass == Pass::kFprop, tiles_y = pass != Pass::kDgrad;
  const double positions = (m + 2.0) * (m + 2.0);
  const double used = tiled_share(tiles_y ? p.p() : p.h, p.dil_h, m) *
                      tiled_share(tiles_y ? p.q() : p.w, p.dil_w, m);
  const double channels = static_cast<double>(p.c) * p.k / (static_cast<double>(p.c) + p.k);
  const double arithmetic = (positions / (9.0 * m * m) + kTransforms / channels) / used;
  const double weights = positions * p.c * p.k / p.flops();
  const double reading = (6 * 4 + (fprop ? 0 : 50)) * weights;
  return std::max(arithmetic, reading) + 0.25 * std::min(arithmetic, reading);
}

}  // namespace

const char* reject(const Variant& variant, Device device, Pass pass, const ConvProblem& problem) {
  if (variant.device != device || variant.pass != pass) return "it serves another device or pass";
  if (!serves(variant, problem.dtype)) return "it computes in another dtype";
  if (device == Device::kCPU && variant.isa > settings().cpu_isa) {
    return "this CPU, or the current setting, does not offer its instruction set";
  }
  if (settings().accuracy != Accuracy::kFast &&
      (is_algo(variant, "winograd3x3") || is_algo(variant, "winograd4x4"))) {
    return "the accuracy setting rules F(3x3, 3x3) and F(4x4, 3x3) out";
  }
  if (settings().accuracy == Accuracy::kDirect && is_algo(variant, "winograd2x2")) {
    return "the accuracy setting rules Winograd out";
  }
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
    // The direct kernel computes one channel a group: a vector's other lanes are wasted. A single channel spread over
    // many filters is what the stem kernels are for.
    per_flop = problem.groups == 1 ? 3.0 : 0.1;
  } else if (is_algo(variant, "stem")) {
    per_flop = 0.8;  // the direct kernel's tiles are set up for longer reductions, and x would be staged for it
  } else if (is_algo(variant, "pointwise")) {
    per_flop = 0.9;  // the direct kernel's tiles are set up for longer reductions
  } else if (is_algo(variant, "grouped")) {
    per_flop = 0.3;  // the direct kernel fills a vector's lanes from one group alone
  } else if (is_algo(variant, "dilated")) {
    const double share =
        in_bounds_share(problem.p(), problem.r, problem.stride_h, problem.pad_h, problem.dil_h, problem.h) *
        in_bounds_share(problem.q(), problem.s, problem.stride_w, problem.pad_w, problem.dil_w, problem.w);
    // A register tile keeps every tap that one of its pixels needs.
    per_flop = std::min(0.99, 0.02 + 1.1 * share);
  } else if (const int32_t m = winograd_tile(variant)) {
    per_flop = winograd_per_flop(problem, variant.pass, m);
  }
  // AVX512-BF16 kernels add two products at once and read half the bytes; Winograd's multiply floats.
  const double width = variant.isa == Isa::kAVX512BF16 && winograd_tile(variant) == 0 ? 0.5
                       : variant.isa >= Isa::kAVX512                                  ? 1.0
                       : variant.isa == Isa::kAVX2                                    ? 2.0
                                                                                      : 6.0;
  // Activations in another type are copied on the way in and out, which takes an element about as long as 50 FLOP.
  const double staging = variant.dtype == problem.dtype ? 0 : 50.0 * (problem.x_size() + problem.y_size());
  return (problem.flops() * per_flop + staging) * width;
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

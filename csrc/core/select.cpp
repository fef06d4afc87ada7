#include "select.h"

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
  static Settings current{detect_cpu_isa(), Accuracy::kFast};
  return current;
}

namespace {

// Whether a kernel serves problems of the dtype: its own, or on the CPU halves staged through float32 (staging.h).
bool serves(const Variant& variant, DType dtype) {
  if (variant.dtype == dtype) return true;
  return variant.device == Device::kCPU && variant.dtype == DType::kFloat32 && dtype_size(dtype) == 2;
}

}  // namespace

const char* reject(const Variant& variant, Device device, Pass pass, const ConvProblem& problem, bool tf32) {
  if (variant.device != device || variant.pass != pass) return "it serves another device or pass";
  if (!serves(variant, problem.dtype)) return "it computes in another dtype";
  if (device == Device::kCPU && variant.isa > settings().cpu_isa) {
    return "this CPU, or the current setting, does not offer its instruction set";
  }
  if (settings().accuracy > variant.strictest) {
    return variant.strictest == Accuracy::kFast ? "the accuracy setting rules F(3x3, 3x3) and F(4x4, 3x3) out"
                                                : "the accuracy setting rules Winograd out";
  }
  if (!tf32 && variant.arithmetic == Arithmetic::tf32) return "rounding to tf32 is not allowed";
  if (problem.is_volume() && !variant.volumes) return "it computes images, not volumes";
  return variant.reject ? variant.reject(problem) : nullptr;
}

int select(Device device, Pass pass, const ConvProblem& problem, bool tf32) {
  int best = -1;
  double best_cost = 0;
  const auto& all = variants();
  for (int i = 0; i < static_cast<int>(all.size()); ++i) {
    if (reject(*all[i], device, pass, problem, tf32)) continue;
    const double c = all[i]->cost(*all[i], problem);
    if (best < 0 || c < best_cost) best = i, best_cost = c;
  }
  return best;
}

std::vector<std::pair<std::string, std::string>> reject_reasons(Device device, Pass pass, const ConvProblem& problem,
                                                                bool tf32) {
  std::vector<std::pair<std::string, std::string>> reasons;
  for (const Variant* variant : variants()) {
    if (variant->device != device || variant->pass != pass) continue;
    if (const char* why = reject(*variant, device, pass, problem, tf32)) reasons.emplace_back(variant->name, why);
  }
  return reasons;
}

}  // namespace convext

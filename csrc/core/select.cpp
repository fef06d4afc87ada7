#include "select.h"

#include <algorithm>

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

std::vector<Work>& costs() {
  static std::vector<Work> seconds;
  return seconds;
}

// Index of a variant of this library.
size_t index_of(const Variant& variant) {
  const auto& all = variants();
  return std::find(all.begin(), all.end(), &variant) - all.begin();
}

}  // namespace

Work work_of(const Variant& variant, const ConvProblem& problem) {
  Work work;
  if (!variant.work) return work;
  work[Term::call] = 1;
  variant.work(variant, problem, work);
  const auto stage = [&](Layout layout, bool takes_nchw, int64_t channels, int64_t pixels, int64_t size) {
    // Of one channel, or one pixel, both orders are one.
    const bool other_order = layout == Layout::kNCHW && !takes_nchw && channels > 1 && pixels > 1;
    if (variant.is_staged(problem)) {
      work[Term::convert] += static_cast<double>(size);
    } else if (other_order) {
      work[Term::copy] += static_cast<double>(size);
    }
  };
  stage(problem.x_layout, variant.takes_nchw_x(), problem.c, int64_t{problem.d} * problem.h * problem.w,
        problem.x_size());
  stage(problem.y_layout, variant.takes_nchw_y(), problem.k, int64_t{problem.z()} * problem.p() * problem.q(),
        problem.y_size());
  return work;
}

double cost_of(const Variant& variant, const ConvProblem& problem) {
  if (!variant.work) return variant.cost(variant, problem);
  const Work work = work_of(variant, problem);
  const size_t index = index_of(variant);
  double seconds = 0;
  for (int i = 0; i < kTerms; ++i) {
    seconds += work.of[i] * (index < costs().size() ? costs()[index].of[i] : kUnmeasuredSeconds);
  }
  return seconds;
}

void set_costs(std::vector<Work> seconds) { costs() = std::move(seconds); }

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
    const double c = cost_of(*all[i], problem);
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

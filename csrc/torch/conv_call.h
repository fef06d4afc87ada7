// One convolution as an op of this library receives it: the geometry, the chosen variant, the weights (packed and kept,
// or dense), batch norm and bias folded into the epilogue. ops_conv.cpp and ops_sequence.cpp share it.
#pragma once
#include <cmath>
#include <optional>
#include <vector>

#include "core/select.h"
#include "cpu/kernels/elementwise/staging.h"
#include "cpu/runtime/packed_weight.h"
#include "torch_glue.h"

namespace convext {

// The variant of that index; the problem's dtype becomes the one that it reads.
inline const Variant& checked_variant(int64_t index, Pass pass, ConvProblem& problem) {
  const auto& all = variants();
  STD_TORCH_CHECK(index >= 0 && index < static_cast<int64_t>(all.size()), "convext_cpu: there is no variant ", index);
  const Variant& variant = *all[index];
  const char* why = reject(variant, Device::kCPU, pass, flattened(problem).problem);
  STD_TORCH_CHECK(why == nullptr, "convext_cpu: ", variant.name, " rejects the problem: ", why);
  problem.dtype = variant.dtype;
  return variant;
}

inline int64_t workspace_bytes(const Variant& variant, const ConvProblem& problem, const Parallel& parallel) {
  return variant.workspace ? Scratch::padded(variant.workspace(problem, parallel.threads)) : 0;
}

inline void launch(const Variant& variant, const ConvProblem& problem, const LaunchArgs& args) {
  const char* failure = variant.launch(problem, args);
  STD_TORCH_CHECK(failure == nullptr, "convext_cpu: ", variant.name, " failed on n=", problem.n, " c=", problem.c,
                  " h=", problem.h, " w=", problem.w, " k=", problem.k, " r=", problem.r, " s=", problem.s, ": ",
                  failure);
}

// The weights as the kernel wants them: packed and kept where the caller has where to keep them, dense KCRS otherwise.
struct Weights {
  const Variant& variant;
  const ConvProblem& problem;
  View view;
  PackedWeight* kept;
  int64_t version;

  bool packs() const { return variant.pack_format != nullptr && variant.pack_format(problem) != nullptr; }
  bool dense() const { return view.dtype == problem.dtype && view.is_dense(Layout::kNCHW); }
  int64_t dense_bytes() const { return dense() ? 0 : Scratch::padded(view.numel() * dtype_size(problem.dtype)); }
  int64_t packed_bytes() const { return packs() && kept == nullptr ? variant.packed_size(problem) : 0; }
  int64_t scratch_bytes() const { return dense_bytes() + Scratch::padded(packed_bytes()); }

  // What a kernel may go back to from its packed weights. This object must outlive the launch.
  WeightSource source() const {
    return {[](const void* context, const Parallel& parallel, void* room) -> const void* {
      const Weights& weights = *static_cast<const Weights*>(context);
      const View& view = weights.view;
      if (weights.dense()) return view.data;
      const Staging& staging = staging_for(settings().cpu_isa);
      staging.weight_to_dense(parallel, view.data, view.dtype, view.size, view.stride, room, weights.problem.dtype);
      return room;
    }, this};
  }

  // `lease` holds what is returned for as long as the kernel reads it.
  const void* get(const Staging& staging, const Parallel& parallel, PackedWeight::Lease& lease) const {
    auto load = [&]() -> const void* {
      if (dense()) return view.data;
      void* copy = scratch().take(dense_bytes());
      staging.weight_to_dense(parallel, view.data, view.dtype, view.size, view.stride, copy, problem.dtype);
      return copy;
    };
    if (!packs()) return load();
    if (kept == nullptr) {
      void* const out = scratch().take(packed_bytes());
      variant.pack(problem, load(), out, parallel);
      return out;
    }
    WeightView weights{view.data, {}, {}, view.dtype};
    std::memcpy(weights.size, view.size, sizeof weights.size);
    std::memcpy(weights.stride, view.stride, sizeof weights.stride);
    lease = kept->get(variant, problem, weights, version, parallel, load);
    return lease.data();
  }
};

// Where the packings of a weight are kept: `number` is a PackedWeight's, 0 stands for nowhere.
inline std::shared_ptr<PackedWeight> packed_weight(int64_t number) {
  if (number == 0) return nullptr;
  std::shared_ptr<PackedWeight> kept = PackedWeight::numbered(number);
  STD_TORCH_CHECK(kept != nullptr, "convext_cpu: there is no packed weight ", number);
  return kept;
}

// Batch norm in inference and the bias, folded: scale = gamma / sqrt(var + eps), shift = beta + (bias - mean) * scale.
// gamma or beta without mean and var scale and shift the biased sum as they are: mean 0, and var 1 with eps 0.
template <class Optional>
struct BatchNormTensors {
  const Optional &bias, &mean, &var, &gamma, &beta;
  double eps;

  // Asks for what `fold` is going to read, so that its waits for memory overlap.
  void read_ahead() const {
    for (const Optional* t : {&bias, &mean, &var, &gamma, &beta}) {
      if (!*t || !(*t)->is_cpu() || !(*t)->is_contiguous()) continue;
      const char* const data = static_cast<const char*>((*t)->const_data_ptr());
      const int64_t bytes = (*t)->numel() * dtype_size(dtype_of(**t));
      for (int64_t at = 0; at < bytes; at += kCacheLine) __builtin_prefetch(data + at);
    }
  }

  bool has_norm() const { return mean.has_value() || gamma.has_value() || beta.has_value(); }
  bool has_any() const { return has_norm() || bias.has_value(); }
  int64_t scratch_bytes(int64_t k, DType accumulate) const {
    return has_any() ? 3 * Scratch::padded(k * dtype_size(accumulate)) : 0;
  }

  template <class T>
  void fold(int64_t k, Epilogue& epilogue) const {
    STD_TORCH_CHECK(mean.has_value() == var.has_value(), "convext_cpu: mean and var come together or not at all");
    if (!has_any()) return;
    T* const shift = static_cast<T*>(scratch().take(k * sizeof(T)));
    const T* const given = channels<T>(bias, "bias", k, T(0), shift);
    epilogue.shift = given;
    if (!has_norm()) return;
    T* const scale = static_cast<T*>(scratch().take(k * sizeof(T)));
    T* const part = static_cast<T*>(scratch().take(k * sizeof(T)));
    epilogue.scale = scale;
    epilogue.shift = shift;
    const T* const factor = channels<T>(gamma, "gamma", k, T(1), scale);
    if (mean) {
      const T* const variance = channels<T>(var, "var", k, T(1), part);
      for (int64_t i = 0; i < k; ++i) scale[i] = factor[i] / std::sqrt(variance[i] + static_cast<T>(eps));
    } else {
      for (int64_t i = 0; i < k; ++i) scale[i] = factor[i];
    }
    const T* const middle = channels<T>(mean, "mean", k, T(0), part);
    for (int64_t i = 0; i < k; ++i) shift[i] = (given[i] - middle[i]) * scale[i];
    if (!beta) return;
    const T* const added = channels<T>(beta, "beta", k, T(0), part);
    for (int64_t i = 0; i < k; ++i) shift[i] += added[i];
  }
};

}  // namespace convext

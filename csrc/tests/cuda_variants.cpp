// Every CUDA variant, run on the CPU from its own source, against the plain loop nest in float64.
//
//   cuda_variants [--one-policy] [--traffic] [<part of a variant's name> ...]
//
// Each variant meets every named edge case that it does not reject, under several policies for the order of threads and
// the landing of asynchronous copies, with buffers that end, or start, at a guard page. --traffic prints global bytes
// over least possible bytes instead, for the layers of known networks. Exits with 1 where anything is wrong.
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "../variant.h"
#include "cuda_on_cpu/cuda_names.h"
#include "reference.h"
#include "tensor.h"

namespace convext {
#define CONVEXT_CUDA_VARIANT(name) extern const Variant name;
#include "../variants.inc"

namespace {

using cuda_on_cpu::Async;
using cuda_on_cpu::DeviceBuffer;
using cuda_on_cpu::Order;
using testing::kSmallestHalf;
using testing::Tensor;

const Variant* const kVariants[] = {
#define CONVEXT_CUDA_VARIANT(name) &name,
#include "../variants.inc"
};

struct Case {
  const char* name;
  ConvProblem problem;
};

constexpr Layout kNCHW = Layout::kNCHW, kNHWC = Layout::kNHWC;

// n c h w / k r s / stride / padding / dilation / groups
ConvProblem nhwc(int n, int c, int h, int w, int k, int r, int s, int stride = 1, int pad = 0, int dil = 1,
                 int groups = 1) {
  return {n, c, h, w, k, r, s, stride, stride, pad, pad, dil, dil, groups, DType::kFloat32, kNHWC, kNHWC};
}
ConvProblem nchw(ConvProblem p) {
  p.x_layout = p.y_layout = kNCHW;
  return p;
}
ConvProblem uneven(ConvProblem p, int stride_w, int pad_w, int dil_w) {
  p.stride_w = stride_w, p.pad_w = pad_w, p.dil_w = dil_w;
  return p;
}

const Case kCases[] = {
    // depthwise
    {"depthwise_3x3", nhwc(2, 32, 11, 9, 32, 3, 3, 1, 1, 1, 32)},
    {"depthwise_3x3_stride_2_even_image", nhwc(2, 16, 12, 10, 16, 3, 3, 2, 1, 1, 16)},
    {"depthwise_3x3_stride_2_odd_image", nhwc(1, 40, 13, 7, 40, 3, 3, 2, 1, 1, 40)},
    {"depthwise_3x3_no_padding", nhwc(1, 8, 6, 5, 8, 3, 3, 1, 0, 1, 8)},
    {"depthwise_channel_tail_of_lanes", nhwc(1, 72, 5, 6, 72, 3, 3, 1, 1, 1, 72)},
    {"depthwise_5x5", nhwc(1, 24, 9, 10, 24, 5, 5, 1, 2, 1, 24)},
    {"depthwise_5x5_stride_2", nhwc(1, 24, 10, 11, 24, 5, 5, 2, 2, 1, 24)},
    {"depthwise_7x7", nhwc(1, 16, 8, 9, 16, 7, 7, 1, 3, 1, 16)},
    {"depthwise_7x7_stride_2", nhwc(2, 8, 11, 8, 8, 7, 7, 2, 3, 1, 8)},
    {"depthwise_padding_past_filter", nhwc(1, 8, 4, 4, 8, 3, 3, 1, 4, 1, 8)},
    {"depthwise_one_by_one_image", nhwc(3, 8, 1, 1, 8, 3, 3, 1, 1, 1, 8)},
    {"depthwise_dilated", nhwc(1, 16, 9, 10, 16, 3, 3, 1, 2, 2, 16)},
    {"depthwise_dilation_past_border", nhwc(1, 16, 5, 6, 16, 3, 3, 1, 6, 6, 16)},
    {"depthwise_stride_3_asymmetric", uneven(nhwc(1, 16, 10, 9, 16, 3, 4, 3, 1, 1, 16), 2, 2, 2)},
    {"depthwise_multiplier_2", nhwc(2, 6, 7, 8, 12, 3, 3, 1, 1, 1, 6)},
    {"depthwise_odd_channels", nhwc(1, 5, 7, 6, 5, 3, 3, 2, 1, 1, 5)},
    {"depthwise_nchw", nchw(nhwc(2, 6, 9, 8, 6, 3, 3, 1, 1, 1, 6))},
    {"depthwise_nchw_stride_2_multiplier_3", nchw(nhwc(1, 4, 9, 8, 12, 5, 3, 2, 1, 1, 4))},
    {"depthwise_one_filter_row", nhwc(1, 8, 1, 20, 8, 1, 7, 1, 0, 1, 8)},
    // direct
    {"pointwise", nhwc(2, 64, 7, 7, 96, 1, 1)},
    {"pointwise_stride_2", nhwc(1, 32, 9, 9, 64, 1, 1, 2)},
    {"direct_3x3", nhwc(1, 32, 9, 11, 40, 3, 3, 1, 1)},
    {"direct_3x3_stride_2", nhwc(2, 32, 9, 10, 64, 3, 3, 2, 1)},
    {"direct_many_tiles_both_ways", nhwc(1, 48, 15, 14, 136, 3, 3, 1, 1)},
    {"c_not_multiple_of_block_k", nhwc(1, 40, 6, 7, 32, 3, 3, 1, 1)},
    {"c_smaller_than_block_k", nhwc(1, 8, 8, 7, 16, 3, 3, 1, 1)},
    {"k_not_multiple_of_block_n", nhwc(1, 32, 6, 6, 72, 3, 3, 1, 1)},
    {"k_not_multiple_of_16_bytes", nhwc(1, 32, 6, 6, 21, 3, 3, 1, 1)},
    {"first_layer_rgb", nhwc(2, 3, 15, 14, 64, 7, 7, 2, 3)},
    {"first_layer_rgb_nchw", nchw(nhwc(1, 3, 12, 13, 32, 3, 3, 2, 1))},
    {"first_layer_grey", nhwc(1, 1, 9, 9, 32, 5, 5, 1, 2)},
    {"first_layer_rgba", nhwc(1, 4, 8, 10, 24, 3, 3, 1, 1)},
    {"grouped", nhwc(1, 64, 7, 6, 96, 3, 3, 1, 1, 1, 2)},
    {"grouped_small_groups", nhwc(1, 32, 6, 7, 32, 3, 3, 1, 1, 1, 8)},
    {"grouped_stride_2", nhwc(1, 48, 7, 8, 48, 3, 3, 2, 1, 1, 3)},
    {"strided_dgrad_hole", nhwc(1, 16, 10, 11, 32, 1, 1, 3)},
    {"stride_larger_than_filter", nhwc(1, 16, 11, 9, 16, 2, 2, 3, 1)},
    {"asymmetric_everything", uneven(nhwc(1, 16, 10, 12, 24, 2, 5, 2, 1, 2), 3, 4, 1)},
    {"dilated", nhwc(1, 32, 12, 13, 32, 3, 3, 1, 2, 2)},
    {"dilation_past_border", nhwc(1, 32, 9, 9, 32, 3, 3, 1, 12, 12)},
    {"dilation_skips_whole_tiles", nhwc(1, 16, 33, 33, 16, 3, 3, 1, 12, 12)},
    {"dilated_stride_2", nhwc(1, 16, 13, 12, 16, 3, 3, 2, 3, 3)},
    {"padding_past_filter", nhwc(1, 16, 4, 5, 16, 3, 3, 1, 5)},
    {"one_pixel", nhwc(1, 16, 3, 3, 16, 3, 3)},
    {"one_dimensional", nhwc(2, 16, 1, 37, 32, 1, 5, 1, 0)},
    {"direct_nchw", nchw(nhwc(2, 12, 7, 8, 20, 3, 3, 1, 1))},
};

int64_t size_of_a(Pass pass, const ConvProblem& p) { return pass == Pass::kFprop ? p.x_size() : p.y_size(); }
int64_t size_of_b(Pass pass, const ConvProblem& p) { return pass == Pass::kWgrad ? p.x_size() : p.w_size(); }
int64_t size_of_out(Pass pass, const ConvProblem& p) {
  return pass == Pass::kFprop ? p.y_size() : pass == Pass::kDgrad ? p.x_size() : p.w_size();
}
bool wants_krsc(const Variant& variant, const ConvProblem& p) {
  return variant.pack_format && strcmp(variant.pack_format(p), "krsc") == 0;
}
bool uses_tf32(const Variant& variant) { return strstr(variant.name, "tf32") != nullptr; }

// ---- one run

struct Policy {
  Async async;
  Order order;
};
constexpr Policy kPolicies[] = {{Async::kLazy, Order::kLifo}, {Async::kEager, Order::kFifo},
                                {Async::kRandom, Order::kRandom}};

enum class Fusion { kNone, kBias, kAll };

int failures = 0, runs = 0;

void report(const Variant& variant, const char* what, const char* why) {
  printf("FAIL %s %s: %s\n", variant.name, what, why);
  ++failures;
}

// Compares with the reference; `slope` bounds the epilogue's own derivative by channel, 1 without an epilogue.
template <class Expected, class Slope>
void compare(const Variant& variant, const char* what, const ConvProblem& p, Pass pass, const Tensor& out,
             const reference::Sums& sums, Expected&& expected, Slope&& slope) {
  const double gemm_k = static_cast<double>(p.gemm_shape(pass).k);
  for (int64_t i = 0; i < static_cast<int64_t>(sums.value.size()); ++i) {
    const double want = expected(i), got = out[i];
    const double bound = slope(i) * reference::sum_bound(p.accumulate_dtype(), gemm_k, sums.magnitude[i],
                                                         sums.square[i], uses_tf32(variant)) +
                         4 * reference::roundoff(p.accumulate_dtype()) * (1 + std::abs(want)) +
                         1.01 * reference::roundoff(p.dtype) * std::abs(want) + kSmallestHalf;
    if (std::abs(got - want) <= bound) continue;
    char text[200];
    snprintf(text, sizeof text, "element %ld is %g, should be %g within %.2g", static_cast<long>(i), got, want, bound);
    report(variant, what, text);
    return;
  }
}

void run_case(const Variant& variant, const Case& named, const Policy& policy, Fusion fusion, unsigned seed) {
  ConvProblem p = named.problem;
  p.dtype = variant.dtype;
  if (variant.reject && variant.reject(p)) return;
  ++runs;
  const Pass pass = variant.pass;
  const bool at_start = seed % 2;
  const bool krsc = wants_krsc(variant, p);
  cuda_on_cpu::config = {policy.async, policy.order, seed};

  Tensor a(p.dtype, size_of_a(pass, p), at_start, 1), b(p.dtype, size_of_b(pass, p), at_start, 2);
  Tensor out(p.dtype, size_of_out(pass, p), at_start);
  Tensor w(p.dtype, p.w_size(), at_start, 3), dx(p.dtype, p.x_size(), at_start);
  DeviceBuffer workspace(variant.workspace ? variant.workspace(p, 1) : 0);
  const DType acc = p.accumulate_dtype();
  Tensor scale(acc, p.k, at_start, 4), shift(acc, p.k, at_start, 5), residual(p.dtype, p.y_size(), at_start, 6);

  LaunchArgs args{};
  args.a = a.buffer.data();
  args.b = b.buffer.data();
  args.out = out.buffer.data();
  args.workspace = workspace.data();
  Activation activation = Activation::identity;
  if (fusion != Fusion::kNone) args.epilogue.shift = shift.buffer.data();
  if (fusion == Fusion::kAll) {
    activation = static_cast<Activation>(1 + seed % 5);
    args.epilogue.scale = scale.buffer.data();
    args.epilogue.residual = residual.buffer.data();
    args.epilogue.activation = activation;
  }
  const bool both = variant.wgrad_writes_dx && seed % 2;
  if (both) args.w = w.buffer.data(), args.dx = dx.buffer.data();

  const std::string what = std::string(named.name) + " (async " + std::to_string(static_cast<int>(policy.async)) +
                           ", order " + std::to_string(static_cast<int>(policy.order)) + ", epilogue " +
                           std::to_string(static_cast<int>(fusion)) + ")";
  if (const char* error = variant.launch(p, args)) {
    report(variant, what.c_str(), error);
    return;
  }

  using Key = std::tuple<const char*, int, int, bool>;
  static std::map<Key, reference::Sums> memory;
  const auto sums_of = [&](Pass which, const std::vector<double>& lhs, const std::vector<double>& rhs, bool order,
                           int tag) -> const reference::Sums& {
    const Key key{named.name, static_cast<int>(which) * 8 + tag, static_cast<int>(p.dtype), order};
    auto found = memory.find(key);
    if (found == memory.end()) found = memory.emplace(key, reference::convolve(which, p, order, lhs, rhs)).first;
    return found->second;
  };
  const reference::Sums& sums = sums_of(pass, a.host, b.host, krsc, 0);
  const auto channel = [&](int64_t i) {
    return p.y_layout == kNHWC ? i % p.k : i / (int64_t{p.p()} * p.q()) % p.k;
  };
  if (pass == Pass::kFprop) {
    compare(
        variant, what.c_str(), p, pass, out, sums,
        [&](int64_t i) {
          double z = sums.value[i];
          if (fusion == Fusion::kAll) z *= scale.host[channel(i)];
          if (fusion != Fusion::kNone) z += shift.host[channel(i)];
          if (fusion == Fusion::kAll) z += residual.host[i];
          return visit_activation<double>(activation, [&](auto f) { return f.forward(z); });
        },
        // No activation is steeper than 1.5 (hardswish at 3).
        [&](int64_t i) { return fusion == Fusion::kAll ? 1.5 * std::abs(scale.host[channel(i)]) : 1.0; });
  } else {
    compare(variant, what.c_str(), p, pass, out, sums, [&](int64_t i) { return sums.value[i]; },
            [](int64_t) { return 1.0; });
  }
  if (both) {
    const reference::Sums& dx_sums = sums_of(Pass::kDgrad, a.host, w.host, krsc, 1);
    compare(variant, (what + " dx").c_str(), p, Pass::kDgrad, dx, dx_sums,
            [&](int64_t i) { return dx_sums.value[i]; }, [](int64_t) { return 1.0; });
  }
}

// ---- counted traffic

struct Layer {
  const char* network;
  const char* name;
  ConvProblem problem;
};

// Batches at which a GPU is busy: on a single small image the fixed costs, filters and fp32 slabs for each of a few
// hundred blocks, would hide what the loops do.
ConvProblem depthwise(int c, int size, int stride) {
  return nhwc(size >= 56 ? 4 : size >= 28 ? 16 : 32, c, size, size, c, 3, 3, stride, 1, 1, c);
}

const Layer kLayers[] = {
    {"MobileNetV2", "depthwise 32 112x112", depthwise(32, 112, 1)},
    {"MobileNetV2", "depthwise 96 112x112 stride 2", depthwise(96, 112, 2)},
    {"MobileNetV2", "depthwise 144 56x56", depthwise(144, 56, 1)},
    {"MobileNetV2", "depthwise 144 56x56 stride 2", depthwise(144, 56, 2)},
    {"MobileNetV2", "depthwise 192 28x28", depthwise(192, 28, 1)},
    {"MobileNetV2", "depthwise 192 28x28 stride 2", depthwise(192, 28, 2)},
    {"MobileNetV2", "depthwise 384 14x14", depthwise(384, 14, 1)},
    {"MobileNetV2", "depthwise 576 14x14 stride 2", depthwise(576, 14, 2)},
    {"MobileNetV2", "depthwise 960 7x7", depthwise(960, 7, 1)},
};

// Bytes over least possible bytes for each layer, in bf16; the depthwise family must stay below the bound.
int print_traffic() {
  constexpr double kBound = 1.15;
  int over = 0;
  printf("%-12s %-32s %-36s %10s %10s %6s\n", "network", "layer", "variant", "bytes", "least", "ratio");
  for (const Layer& layer : kLayers) {
    for (const Variant* variant : kVariants) {
      ConvProblem p = layer.problem;
      p.dtype = DType::kBFloat16;
      if (variant->dtype != p.dtype || strcmp(variant->algo, "depthwise") || !strstr(variant->name, "window")) continue;
      if (variant->reject(p)) continue;
      const bool one_pass = variant->wgrad_writes_dx;
      Tensor a(p.dtype, size_of_a(variant->pass, p), false, 1), b(p.dtype, size_of_b(variant->pass, p), false, 2);
      Tensor out(p.dtype, size_of_out(variant->pass, p), false), w(p.dtype, p.w_size(), false, 3);
      Tensor dx(p.dtype, p.x_size(), false);
      Tensor shift(DType::kFloat32, p.k, false, 4), scale(DType::kFloat32, p.k, false, 5);
      DeviceBuffer workspace(variant->workspace ? variant->workspace(p, 1) : 0);
      LaunchArgs args{};
      args.a = a.buffer.data(), args.b = b.buffer.data(), args.out = out.buffer.data();
      args.workspace = workspace.data();
      if (variant->pass == Pass::kFprop) {
        args.epilogue.scale = scale.buffer.data();
        args.epilogue.shift = shift.buffer.data();
      }
      if (one_pass) args.w = w.buffer.data(), args.dx = dx.buffer.data();
      cuda_on_cpu::reset_counters();
      if (const char* error = variant->launch(p, args)) {
        report(*variant, layer.name, error);
        continue;
      }
      const auto& counted = cuda_on_cpu::counters;
      const double bytes = static_cast<double>(counted.read_bytes + counted.written_bytes);
      const double tensors = one_pass ? double(p.y_size()) + 2.0 * p.x_size() : double(p.y_size()) + p.x_size();
      const double least = (tensors + p.w_size()) * dtype_size(p.dtype);
      const double ratio = bytes / least;
      printf("%-12s %-32s %-36s %10.0f %10.0f %6.3f\n", layer.network, layer.name, variant->name, bytes, least, ratio);
      if (!(ratio >= 0.999 && ratio <= kBound)) ++over;
    }
  }
  if (over) printf("%d layers outside of [1, %.2f]\n", over, kBound);
  return over;
}

}  // namespace
}  // namespace convext

int main(int argc, char** argv) {
  using namespace convext;
  bool one_policy = false, traffic = false;
  std::vector<std::string> parts;
  for (int i = 1; i < argc; ++i) {
    if (!strcmp(argv[i], "--one-policy")) one_policy = true;
    else if (!strcmp(argv[i], "--traffic")) traffic = true;
    else parts.push_back(argv[i]);
  }
  if (traffic) return print_traffic() || failures;
  int variants = 0;
  for (const Variant* variant : kVariants) {
    bool wanted = parts.empty();
    for (const auto& part : parts) wanted |= strstr(variant->name, part.c_str()) != nullptr;
    if (!wanted) continue;
    ++variants;
    const int runs_before = runs;
    unsigned seed = 0;
    for (const Case& named : kCases) {
      for (const Policy& policy : kPolicies) {
        const auto fusion = variant->pass == Pass::kFprop ? static_cast<Fusion>(seed % 3) : Fusion::kNone;
        run_case(*variant, named, policy, fusion, ++seed);
        if (one_policy) break;
      }
    }
    if (runs == runs_before) report(*variant, "every case", "it is rejected by all of them");
  }
  printf("%d variants, %d runs, %d failures\n", variants, runs, failures);
  return failures != 0 || variants == 0;
}

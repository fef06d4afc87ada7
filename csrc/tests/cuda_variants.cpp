// Every CUDA variant, run from its own source, against the plain loop nest in float64.
//
//   cuda_variants [--one-policy] [--sm <80 ...>] [--case <name> ...] [<part of a variant's name> ...]
//
// Each variant meets every named edge case that it does not reject. On the CPU that happens under several policies for
// the order of threads and the landing of asynchronous copies, with buffers that end, or start, at a guard page; on a
// GPU once, and compute-sanitizer can watch. Exits with 1 where anything is wrong.
#if defined(CONVEXT_CUDA_ON_CPU)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "core/variant.h"
#include "cuda/batch_norm/batch_norm.h"
#include "device.h"
#include "reference.h"
#include "tensor.h"

namespace convext {
#define CONVEXT_CUDA_VARIANT(name) extern const Variant name;
#include "core/variants.inc"

namespace {

using testing::Async;
using testing::DeviceBuffer;
using testing::kSmallestHalf;
using testing::Order;
using testing::Tensor;

const Variant* const kVariants[] = {
#define CONVEXT_CUDA_VARIANT(name) &name,
#include "core/variants.inc"
};

struct Case {
  const char* name;
  ConvProblem problem;
  bool stem_alone = false;  // as large as its kernels need it, and others take long for
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
    {"depthwise_taps_past_shared_memory", nhwc(1, 2, 12, 13, 2, 11, 11, 1, 5, 1, 2)},
    {"depthwise_dilated_5x5_stride_2", nhwc(2, 8, 13, 14, 8, 5, 5, 2, 4, 2, 8)},
    {"depthwise_dilated_multiplier_3_nchw", nchw(nhwc(2, 4, 9, 7, 12, 3, 3, 1, 3, 3, 4))},
    {"depthwise_nchw_wide_rows", nchw(nhwc(1, 3, 5, 40, 3, 3, 3, 1, 1, 1, 3))},
    {"depthwise_nchw_small_planes_7x7", nchw(nhwc(2, 20, 7, 7, 20, 7, 7, 1, 3, 1, 20))},
    {"depthwise_nchw_5x5_stride_2", nchw(nhwc(2, 9, 11, 8, 9, 5, 5, 2, 2, 1, 9))},
    {"depthwise_nchw_dilated", nchw(nhwc(1, 5, 9, 10, 5, 3, 3, 1, 2, 2, 5))},
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
    {"first_layer_rgba_nchw", nchw(nhwc(2, 4, 9, 20, 72, 3, 3, 2, 1))},
    {"first_layer_patches", nhwc(1, 3, 16, 40, 96, 4, 4, 4)},
    {"first_layer_two_channels_dilated", uneven(nhwc(1, 2, 14, 19, 21, 3, 5, 1, 2, 2), 3, 4, 1)},
    {"first_layer_11x11", nhwc(1, 3, 19, 23, 64, 11, 11, 4, 2)},
    {"first_layer_padding_past_the_patch", nhwc(1, 3, 5, 6, 16, 3, 3, 1, 9)},
    {"first_layer_images_in_tiles", nhwc(3, 3, 18, 35, 40, 3, 3, 2, 1)},
    {"first_layer_more_tiles_than_blocks", nhwc(1, 1, 184, 370, 8, 3, 3, 1, 1), true},
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
bool uses_tf32(const Variant& variant) { return variant.arithmetic == Arithmetic::tf32; }

// ---- one run

struct Policy {
  Async async;
  Order order;
};
constexpr Policy kPolicies[] = {
    {Async::kLazy, Order::kLifo}, {Async::kEager, Order::kFifo}, {Async::kRandom, Order::kRandom}};

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

int64_t channel_of(const ConvProblem& p, int64_t i) {
  return p.y_layout == kNHWC ? i % p.k : i / (int64_t{p.p()} * p.q()) % p.k;
}

// Holds the rows of partial statistics, merged here in float64, against the mean and the variance of what was stored.
void compare_stats(const Variant& variant, const char* what, const ConvProblem& p, const Tensor& out,
                   const DeviceBuffer& partial, int64_t rows) {
  const DType acc = p.accumulate_dtype();
  std::vector<unsigned char> raw(partial.bytes());
  testing::download(partial, raw.data());
  const auto moment = [&](int64_t row, int64_t k, int which) {
    return testing::read_element(acc, raw.data(), (row * p.k + k) * 2 + which);
  };
  const auto count = [&](int64_t row) { return testing::read_element(acc, raw.data(), rows * p.k * 2 + row); };
  const double pixels = static_cast<double>(p.npq()), root = std::sqrt(pixels + 1), u = reference::roundoff(acc);
  // Wider than double: a plain sum of values that are all alike rounds each time to the same side.
  std::vector<long double> sums(p.k);
  std::vector<double> mean(p.k), var(p.k), peak(p.k);
  for (int64_t i = 0; i < p.y_size(); ++i) sums[channel_of(p, i)] += out[i];
  for (int64_t k = 0; k < p.k; ++k) mean[k] = static_cast<double>(sums[k] / pixels);
  for (int64_t i = 0; i < p.y_size(); ++i) {
    const int64_t k = channel_of(p, i);
    var[k] += (out[i] - mean[k]) * (out[i] - mean[k]) / pixels;
    peak[k] = std::max(peak[k], std::abs(out[i]));
  }
  double counted = 0;
  for (int64_t row = 0; row < rows; ++row) counted += count(row);
  bool good = counted == pixels;
  for (int64_t k = 0; k < p.k && good; ++k) {
    double got_mean = 0, got_var = 0;
    for (int64_t row = 0; row < rows; ++row) got_mean += count(row) * moment(row, k, 0) / pixels;
    for (int64_t row = 0; row < rows; ++row) {
      const double delta = moment(row, k, 0) - got_mean;
      got_var += (moment(row, k, 1) + count(row) * delta * delta) / pixels;
    }
    // Each of Welford's updates rounds at the size of the mean, and of the deviation times the rounded mean.
    good = std::abs(got_mean - mean[k]) <= 4 * root * u * peak[k] &&
           std::abs(got_var - var[k]) <= 4 * root * u * (var[k] + std::sqrt(var[k]) * peak[k]);
  }
  if (!good) report(variant, what, "the batch statistics are wrong");
}

void run_case(const Variant& variant, const Case& named, const Policy& policy, Fusion fusion, unsigned seed) {
  ConvProblem p = named.problem;
  p.dtype = variant.dtype;
  if (variant.reject && variant.reject(p)) return;
  ++runs;
  const Pass pass = variant.pass;
  const bool at_start = seed % 2;
  const bool krsc = wants_krsc(variant, p);
  testing::set_policy(policy.async, policy.order, seed);

  Tensor a(p.dtype, size_of_a(pass, p), at_start, 1), b(p.dtype, size_of_b(pass, p), at_start, 2);
  Tensor out(p.dtype, size_of_out(pass, p), at_start);
  Tensor w(p.dtype, p.w_size(), at_start, 3), dx(p.dtype, p.x_size(), at_start);
  DeviceBuffer workspace(variant.workspace ? variant.workspace(p, 1) : 0);
  const DType acc = p.accumulate_dtype();
  // With a bias alone, statistics too. A mean far from zero is where sums of squares cancel; halves could not hold it.
  const bool with_stats = variant.stats_rows && fusion == Fusion::kBias;
  const double far = with_stats && dtype_size(p.dtype) > 2 ? 1000 : 0;
  Tensor scale(acc, p.k, at_start, 4), shift(acc, p.k, at_start, 5, far), residual(p.dtype, p.y_size(), at_start, 6);
  const int64_t stats_rows = with_stats ? variant.stats_rows(p) : 0;
  DeviceBuffer stats(cuda::partial_stats_bytes(stats_rows, p.k, acc), at_start);

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
  if (with_stats) args.stats = stats.data();
  const bool both = variant.wgrad_writes_dx && seed % 2;
  if (both) args.w = w.buffer.data(), args.dx = dx.buffer.data();

  const std::string what = std::string(named.name) + " (async " + std::to_string(static_cast<int>(policy.async)) +
                           ", order " + std::to_string(static_cast<int>(policy.order)) + ", epilogue " +
                           std::to_string(static_cast<int>(fusion)) + ")";
  const char* error = variant.launch(p, args);
  if (error == nullptr) error = testing::wait_for_kernels();
  if (error) {
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
  const auto channel = [&](int64_t i) { return channel_of(p, i); };
  if (pass == Pass::kFprop) {
    compare(variant, what.c_str(), p, pass, out, sums,
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
  if (with_stats) compare_stats(variant, what.c_str(), p, out, stats, stats_rows);
  if (both) {
    const reference::Sums& dx_sums = sums_of(Pass::kDgrad, a.host, w.host, krsc, 1);
    compare(variant, (what + " dx").c_str(), p, Pass::kDgrad, dx, dx_sums, [&](int64_t i) { return dx_sums.value[i]; },
            [](int64_t) { return 1.0; });
  }
}

// ---- tensors of more than 2^31 elements
#if defined(CONVEXT_CUDA_ON_CPU)

// Memory that takes room only where it is touched.
class SparseMemory {
 public:
  explicit SparseMemory(int64_t bytes) : bytes_(bytes) {
    data_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  ~SparseMemory() {
    if (good()) munmap(data_, bytes_);
  }
  SparseMemory(const SparseMemory&) = delete;
  SparseMemory& operator=(const SparseMemory&) = delete;
  bool good() const { return data_ != MAP_FAILED; }
  void* data() const { return data_; }

 private:
  void* data_;
  int64_t bytes_;
};

// A 1x1 filter over so few places of so large a tensor that a 32-bit offset would miss the last of them: fprop and
// wgrad read x at the four corners of an image by a huge stride; dgrad reads dy in the middle of huge padding. All
// values are small whole numbers, so results are exact.
void run_past_32_bits(const Variant& variant) {
  constexpr int kChannels = 8;
  const bool depthwise = variant.algorithm == Algorithm::depthwise, dgrad = variant.pass == Pass::kDgrad;
  if (depthwise && variant.pass == Pass::kWgrad) return;  // it walks over every pixel of x
  for (const Layout layout : {kNHWC, kNCHW}) {
    ConvProblem p = nhwc(1, kChannels, 65537, 4097, kChannels, 1, 1, 1, 0, 1, depthwise ? kChannels : 1);
    p.stride_h = 65536, p.stride_w = 4096;
    if (dgrad) p.h = p.w = p.stride_h = p.stride_w = 1, p.pad_h = 65537, p.pad_w = 2048;
    p.dtype = variant.dtype, p.x_layout = p.y_layout = layout;
    if (variant.reject(p)) continue;
    ++runs;
    SparseMemory large((dgrad ? p.y_size() : p.x_size()) * dtype_size(p.dtype));
    if (!large.good()) return report(variant, "past_32_bits", "no address space");
    const int32_t height = dgrad ? p.p() : p.h, width = dgrad ? p.q() : p.w;
    struct Place {
      int32_t h, w;
    };
    std::vector<Place> places = {{0, 0}, {0, 4096}, {65536, 0}, {65536, 4096}};
    if (dgrad) places = {{p.pad_h, p.pad_w}};
    const auto in = [&](size_t place, int c) { return double((c + 3 * static_cast<int>(place)) % 5 - 2); };
    const auto other = [&](int64_t i) { return double(i % 7 - 3); };  // w, or dy
    for (size_t i = 0; i < places.size(); ++i) {
      for (int c = 0; c < kChannels; ++c) {
        const int64_t at = reference::offset(layout, 0, c, places[i].h, places[i].w, kChannels, height, width);
        testing::write_element(p.dtype, large.data(), at, in(i, c));
      }
    }
    const Pass pass = variant.pass;
    const int64_t pixels = static_cast<int64_t>(places.size());
    const int64_t small_size = pass == Pass::kWgrad ? p.y_size() : p.w_size();
    std::vector<unsigned char> raw(small_size * dtype_size(p.dtype));
    for (int64_t i = 0; i < small_size; ++i) testing::write_element(p.dtype, raw.data(), i, other(i));
    DeviceBuffer small(raw.size()), workspace(variant.workspace ? variant.workspace(p, 1) : 0);
    testing::upload(small, raw.data());
    Tensor out(p.dtype, size_of_out(pass, p), false);
    LaunchArgs args{};
    args.a = pass == Pass::kWgrad ? small.data() : large.data();
    args.b = pass == Pass::kWgrad ? large.data() : small.data();
    args.out = out.buffer.data();
    args.workspace = workspace.data();
    if (const char* error = variant.launch(p, args)) return report(variant, "past_32_bits", error);
    // y[pixel, k] = sum_c x w[k, c]; dx[c] = sum_k dy[k] w[k, c]; dw[k, c] = sum over pixels of dy[k] x[c].
    const int groups = p.groups, per_group = kChannels / groups;
    for (int64_t i = 0; i < (pass == Pass::kWgrad ? p.w_size() : pixels * kChannels); ++i) {
      double want = 0, got = 0;
      if (pass == Pass::kWgrad) {
        const int k = static_cast<int>(i / per_group), c = static_cast<int>(i % per_group);
        for (int64_t m = 0; m < pixels; ++m) {
          want += in(m, c) * other(layout == kNHWC ? m * kChannels + k : k * pixels + m);
        }
        got = out[i];
      } else {
        const int64_t m = i / kChannels;
        const int channel = static_cast<int>(i % kChannels), first = channel / per_group * per_group;
        for (int c = first; c < first + per_group; ++c) {
          const int k = dgrad ? c : channel, column = (dgrad ? channel : c) % per_group;
          want += in(m, c) * other(int64_t{k} * per_group + column);
        }
        got = out[layout == kNHWC ? i : channel * pixels + m];
      }
      if (got == want) continue;
      char text[100];
      snprintf(text, sizeof text, "element %ld is %g, should be %g", static_cast<long>(i), got, want);
      return report(variant, "past_32_bits", text);
    }
  }
}
#else
void run_past_32_bits(const Variant&) {}  // tests/test_gpu.py has room for the real thing
#endif

}  // namespace
}  // namespace convext

int main(int argc, char** argv) {
  using namespace convext;
  setvbuf(stdout, nullptr, _IOLBF, 0);  // failures are told even where the time runs out
  bool one_policy = !testing::kPoliciesMatter;
  std::vector<std::string> parts, cases;
  for (int i = 1; i < argc; ++i) {
    if (!strcmp(argv[i], "--one-policy")) one_policy = true;
    else if (!strcmp(argv[i], "--sm") && i + 1 < argc) testing::set_limits_of(atoi(argv[++i]));
    else if (!strcmp(argv[i], "--case") && i + 1 < argc) cases.push_back(argv[++i]);
    else parts.push_back(argv[i]);
  }
  int variants = 0;
  for (const Variant* variant : kVariants) {
    bool wanted = parts.empty();
    for (const auto& part : parts) wanted |= strstr(variant->name, part.c_str()) != nullptr;
    if (!wanted) continue;
    ++variants;
    const int runs_before = runs;
    unsigned seed = 0;
    for (const Case& named : kCases) {
      if (!cases.empty() && std::find(cases.begin(), cases.end(), named.name) == cases.end()) continue;
      if (named.stem_alone && variant->algorithm != Algorithm::stem) continue;
      for (const Policy& policy : kPolicies) {
        const auto fusion = variant->pass == Pass::kFprop ? static_cast<Fusion>(seed % 3) : Fusion::kNone;
        run_case(*variant, named, policy, fusion, ++seed);
        if (one_policy) break;
      }
    }
    if (cases.empty()) run_past_32_bits(*variant);
    if (runs == runs_before) report(*variant, "every case", "it is rejected by all of them");
  }
  printf("%d variants, %d runs, %d failures\n", variants, runs, failures);
  return failures != 0 || variants == 0;
}

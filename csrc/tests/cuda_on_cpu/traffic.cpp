// Global memory traffic of the CUDA kernels on the layers of known networks, counted while they run on the CPU.
//
// For each layer and pass, the kernel that selection takes, in bf16: bytes read and written (sectors of 32 bytes, once
// for each block that touches them: the traffic behind a perfect first-level cache) over the least that any kernel must
// move, which is every operand once. Exits with 1 where a ratio is out of bounds: 1.15 for depthwise kernels, and for
// what the epilogue and the batch statistics move.
//
// A matrix-product kernel reads its operands again for each tile beside the first; that comes out of the second-level
// cache, and its ratio is printed without a bound. An argument names the one network that is wanted.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "launch.h"

namespace convext {
namespace {

using testing::kVariants;

constexpr double kBound = 1.15;
constexpr Layout kNCHW = Layout::kNCHW, kNHWC = Layout::kNHWC;
int out_of_bounds = 0;

struct Layer {
  const char* network;
  ConvProblem problem;
};

// A square filter of `r` taps a side, padded so that an unstrided output has the input's size.
ConvProblem square(int n, int c, int size, int k, int r, int stride = 1, int dil = 1, int groups = 1) {
  const int pad = dil * (r / 2);
  return {n, c, size, size, k, r, r, stride, stride, pad, pad, dil, dil, groups, DType::kBFloat16, kNHWC, kNHWC};
}
// Batches at which a GPU is busy: on a single small image the fixed costs, filters and fp32 slabs for each of a few
// hundred blocks, would hide what the loops do.
ConvProblem depthwise(int c, int size, int stride, int dil = 1) {
  return square(size >= 56 ? 4 : size >= 28 ? 16 : 32, c, size, c, 3, stride, dil, c);
}
ConvProblem direct(int c, int size, int k, int r = 1, int stride = 1, int dil = 1) {
  return square(1, c, size, k, r, stride, dil);
}
ConvProblem nchw(ConvProblem p) {
  p.x_layout = p.y_layout = kNCHW;
  return p;
}

// Every distinct layer of the two networks; an atrous spatial pyramid over MobileNetV2's last but one stage.
const Layer kLayers[] = {
    {"MobileNetV2", depthwise(32, 112, 1)},
    {"MobileNetV2", depthwise(96, 112, 2)},
    {"MobileNetV2", depthwise(144, 56, 1)},
    {"MobileNetV2", depthwise(144, 56, 2)},
    {"MobileNetV2", depthwise(192, 28, 1)},
    {"MobileNetV2", depthwise(192, 28, 2)},
    {"MobileNetV2", depthwise(384, 14, 1)},
    {"MobileNetV2", depthwise(576, 14, 1)},
    {"MobileNetV2", depthwise(576, 14, 2)},
    {"MobileNetV2", depthwise(960, 7, 1)},
    {"MobileNetV2", nchw(depthwise(32, 112, 1))},
    {"MobileNetV2", nchw(depthwise(96, 112, 2))},
    {"MobileNetV2", nchw(depthwise(192, 28, 1))},
    {"MobileNetV2", nchw(depthwise(384, 14, 1))},
    {"MobileNetV2", direct(3, 224, 32, 3, 2)},
    {"MobileNetV2", direct(32, 112, 16)},
    {"MobileNetV2", direct(16, 112, 96)},
    {"MobileNetV2", direct(96, 56, 24)},
    {"MobileNetV2", direct(24, 56, 144)},
    {"MobileNetV2", direct(144, 56, 24)},
    {"MobileNetV2", direct(144, 28, 32)},
    {"MobileNetV2", direct(32, 28, 192)},
    {"MobileNetV2", direct(192, 28, 32)},
    {"MobileNetV2", direct(192, 14, 64)},
    {"MobileNetV2", direct(64, 14, 384)},
    {"MobileNetV2", direct(384, 14, 64)},
    {"MobileNetV2", direct(384, 14, 96)},
    {"MobileNetV2", direct(96, 14, 576)},
    {"MobileNetV2", direct(576, 14, 96)},
    {"MobileNetV2", direct(576, 7, 160)},
    {"MobileNetV2", direct(160, 7, 960)},
    {"MobileNetV2", direct(960, 7, 160)},
    {"MobileNetV2", direct(960, 7, 320)},
    {"MobileNetV2", direct(320, 7, 1280)},
    {"ResNet-50", direct(3, 224, 64, 7, 2)},
    {"ResNet-50", direct(64, 56, 64)},
    {"ResNet-50", direct(64, 56, 64, 3)},
    {"ResNet-50", direct(64, 56, 256)},
    {"ResNet-50", direct(256, 56, 64)},
    {"ResNet-50", direct(256, 56, 128)},
    {"ResNet-50", direct(256, 56, 512, 1, 2)},
    {"ResNet-50", direct(128, 56, 128, 3, 2)},
    {"ResNet-50", direct(128, 28, 128, 3)},
    {"ResNet-50", direct(128, 28, 512)},
    {"ResNet-50", direct(512, 28, 128)},
    {"ResNet-50", direct(512, 28, 256)},
    {"ResNet-50", direct(512, 28, 1024, 1, 2)},
    {"ResNet-50", direct(256, 28, 256, 3, 2)},
    {"ResNet-50", direct(256, 14, 256, 3)},
    {"ResNet-50", direct(256, 14, 1024)},
    {"ResNet-50", direct(1024, 14, 256)},
    {"ResNet-50", direct(1024, 14, 512)},
    {"ResNet-50", direct(1024, 14, 2048, 1, 2)},
    {"ResNet-50", direct(512, 14, 512, 3, 2)},
    {"ResNet-50", direct(512, 7, 512, 3)},
    {"ResNet-50", direct(512, 7, 2048)},
    {"ResNet-50", direct(2048, 7, 512)},
    {"ASPP", direct(320, 33, 256)},
    {"ASPP", direct(320, 33, 256, 3, 1, 6)},
    {"ASPP", direct(320, 33, 256, 3, 1, 12)},
    {"ASPP", direct(320, 33, 256, 3, 1, 18)},
    {"ASPP", depthwise(320, 33, 1, 6)},
    {"ASPP", depthwise(320, 33, 1, 12)},
    {"ASPP", depthwise(320, 33, 1, 18)},
    {"ASPP", direct(1280, 33, 256)},
};

// Positions of an axis that some tap of some output meets.
int64_t met(int32_t size, int32_t out, int32_t taps, int32_t stride, int32_t pad, int32_t dil) {
  std::vector<bool> seen(size);
  for (int32_t o = 0; o < out; ++o) {
    for (int32_t t = 0; t < taps; ++t) {
      const int32_t i = o * stride - pad + t * dil;
      if (i >= 0 && i < size) seen[i] = true;
    }
  }
  int64_t count = 0;
  for (const bool s : seen) count += s;
  return count;
}

const Variant* cheapest(Pass pass, const ConvProblem& p) {
  const Variant* best = nullptr;
  for (const Variant* v : kVariants) {
    if (v->pass != pass || v->dtype != p.dtype || v->reject(p)) continue;
    if (!best || v->cost(*v, p) < best->cost(*best, p)) best = v;
  }
  return best;
}

// What has to lie within bounds.
void check(double ratio, double bound = kBound) {
  if (!(ratio >= 0.999 && ratio <= bound)) ++out_of_bounds;
}

// What the partial statistics may add to y, where a layer has few filters: a row of them is two floats a filter, and its
// count takes a sector of its own. Both are written and read once.
double statistics_bound(const Variant& v, const ConvProblem& p, double y_bytes) {
  constexpr double kSector = 32;
  return 1 + 2 * double(v.stats_rows(p)) * (2 * 4.0 * p.k + kSector) / y_bytes;
}

void print_row(const char* network, const ConvProblem& p, const Variant& v) {
  const bool fprop = v.pass == Pass::kFprop, depthwise = p.is_depthwise();
  const double element = double(dtype_size(p.dtype)), y_bytes = element * p.y_size();
  const double x_met = element * p.n * p.c * met(p.h, p.p(), p.r, p.stride_h, p.pad_h, p.dil_h) *
                       met(p.w, p.q(), p.s, p.stride_w, p.pad_w, p.dil_w);
  const testing::Run run(v, p);
  double least = y_bytes + element * p.w_size();  // dy and w, or y and w, or dy and dw
  least += v.pass == Pass::kDgrad ? element * p.x_size() : x_met;
  if (v.wgrad_writes_dx) least += element * (p.x_size() + p.w_size());
  if (fprop) least += y_bytes + 2 * 4.0 * p.k;  // residual, scale and shift
  const double ratio = run.bytes / least;
  char shape[64];
  snprintf(shape, sizeof shape, "%s%d %dx%d -> %d, %dx%d%s%s%s", depthwise ? "depthwise " : "", p.c, p.h, p.w, p.k, p.r,
           p.s, p.stride_h > 1 ? " stride 2" : "", p.dil_h > 1 ? " dilation " : "",
           p.dil_h > 1 ? std::to_string(p.dil_h).c_str() : "");
  printf("%-12s%-46s%-5s%-40s%11.0f%11.0f%8.3f", network, shape, p.x_layout == kNCHW ? "NCHW" : "NHWC", v.name,
         run.bytes, least, ratio);
  if (depthwise) check(ratio);
  if (fprop) {
    const double epilogue = (run.parameter_bytes() + run.out.buffer.written_bytes()) / (2 * y_bytes + 2 * 4.0 * p.k);
    // The partials are written here and read once more by the kernel that merges them.
    const double statistics = (run.out.buffer.written_bytes() + 2.0 * run.stats.written_bytes()) / y_bytes;
    printf("%9.3f%9.3f", epilogue, statistics);
    check(epilogue);
    // With fewer pixels the last row of tiles is mostly empty.
    if (p.npq() >= 1024) check(statistics, std::max(kBound, statistics_bound(v, p, y_bytes)));
  }
  printf("\n");
}

}  // namespace
}  // namespace convext

int main(int argc, char** argv) {
  using namespace convext;
  cuda_on_cpu::config.traffic_only = true;
  const char* const network = argc > 1 ? argv[1] : "";
  printf("%-12s%-46s%-5s%-40s%11s%11s%8s%9s%9s\n", "network", "layer", "", "variant", "bytes", "least", "ratio",
         "epilogue", "stats");
  for (const Layer& layer : kLayers) {
    if (!strstr(layer.network, network)) continue;
    for (const Pass pass : {Pass::kFprop, Pass::kDgrad, Pass::kWgrad}) {
      if (const Variant* v = cheapest(pass, layer.problem)) print_row(layer.network, layer.problem, *v);
    }
  }
  printf("%d ratios outside of [1, %.2f], %d failures\n", out_of_bounds, kBound, testing::failures);
  return out_of_bounds || testing::failures;
}

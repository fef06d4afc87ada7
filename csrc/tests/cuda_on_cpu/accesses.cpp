// How the warps of each kernel access shared and global memory, place by place in its code.
//
//   accesses [<part of a kernel's name> ...]
//
// Problems are of whole tiles, so that no lane stands aside, and start at whole sectors. Prints a line for each place
// that a kernel accesses memory at, fields parted by tabs:
//
//   kernel  problem  place  shared|global  load|store  bytes a lane  accesses of a warp  turns  least turns
//   sectors  least sectors
//
// tests/support/accesses.py reads them. Places are relative to the program's start, for addr2line.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "launch.h"

namespace convext {
namespace {

using testing::failures;
using testing::kVariants;
using testing::Tensor;

constexpr Layout kNCHW = Layout::kNCHW, kNHWC = Layout::kNHWC;

struct Case {
  const char* name;
  ConvProblem problem;
};

// A square filter of `r` taps a side.
ConvProblem square(int n, int c, int h, int w, int k, int r, int stride, int pad, int dil, int groups, Layout layout) {
  return {n, c, h, w, k, r, r, stride, stride, pad, pad, dil, dil, groups, DType::kFloat32, layout, layout};
}
ConvProblem depthwise(int c, int h, int w, int r, int stride = 1, int dil = 1, Layout layout = kNHWC) {
  return square(1, c, h, w, c, r, stride, dil * (r / 2), dil, c, layout);
}

// Each variant takes the first two that it does not reject.
const Case kCases[] = {
    {"1x1, 128 -> 128", square(2, 128, 16, 16, 128, 1, 1, 0, 1, 1, kNHWC)},
    {"3x3, 64 -> 128", square(2, 64, 16, 16, 128, 3, 1, 1, 1, 1, kNHWC)},
    {"7x7 stride 2, 3 -> 64", square(1, 3, 32, 32, 64, 7, 2, 3, 1, 1, kNHWC)},
    {"3x3, 4 -> 32", square(1, 4, 32, 32, 32, 3, 1, 1, 1, 1, kNHWC)},
    {"depthwise 3x3, 64", depthwise(64, 32, 32, 3)},
    {"depthwise 5x5 stride 2, 64", depthwise(64, 32, 32, 5, 2)},
    {"depthwise 7x7, 64", depthwise(64, 32, 32, 7)},
    {"depthwise 3x3 planes, 16", depthwise(16, 32, 32, 3, 1, 1, kNCHW)},
    {"depthwise 5x5 stride 2 planes, 16", depthwise(16, 32, 32, 5, 2, 1, kNCHW)},
    {"depthwise 3x3 dilated, 64", depthwise(64, 16, 16, 3, 1, 2)},
};

void print_accesses(const char* kernel, const char* problem) {
  for (const auto& a : cuda_on_cpu::warp_accesses()) {
    Dl_info info{};
    dladdr(a.site, &info);
    // The call's own place is the byte before where it returns to.
    const auto place = static_cast<const char*>(a.site) - static_cast<const char*>(info.dli_fbase) - 1;
    printf("%s\t%s\t%#lx\t%s\t%s\t%d\t%lu\t%lu\t%lu\t%lu\t%lu\n", kernel, problem, static_cast<unsigned long>(place),
           a.shared ? "shared" : "global", a.write ? "store" : "load", a.bytes, static_cast<unsigned long>(a.warps),
           static_cast<unsigned long>(a.turns), static_cast<unsigned long>(a.least_turns),
           static_cast<unsigned long>(a.sectors), static_cast<unsigned long>(a.least_sectors));
  }
  cuda_on_cpu::reset_warp_accesses();
}

void run_variant(const Variant& v) {
  int taken = 0;
  for (const Case& c : kCases) {
    ConvProblem p = c.problem;
    p.dtype = v.dtype;
    if (v.reject(p)) continue;
    const testing::Run run(v, p);
    print_accesses(v.name, c.name);
    if (++taken == 2) return;
  }
  if (taken == 0) printf("FAIL %s: it rejects every problem\n", v.name), ++failures;
}

void run_batch_norm(const char* dtype_name, DType dtype, const std::function<bool(const char*)>& wanted) {
  const DType acc = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  for (const int64_t c : {64, 512}) {
    const cuda::NormShape shape{2, c, 32, 16, dtype, kNHWC};
    const int64_t size = shape.n * shape.c * shape.h * shape.w;
    Tensor y(dtype, size, false), dout(dtype, size, false), residual(dtype, size, false), out(dtype, size, false);
    Tensor dresidual(dtype, size, false), mean(acc, c, false), var(acc, c, false), gamma(acc, c, false);
    Tensor beta(acc, c, false), dgamma(acc, c, false), dbeta(acc, c, false);
    testing::DeviceBuffer workspace((cuda::norm_workspace(shape) + 255) / 256 * 256);
    const cuda::NormParameters parameters{mean.buffer.data(), var.buffer.data(), gamma.buffer.data(),
                                          beta.buffer.data(), 1e-3};
    const std::string problem = std::to_string(c) + " channels";
    const auto report = [&](const char* pass, const std::function<const char*()>& launch) {
      const std::string name = std::string(pass) + "_" + dtype_name;
      if (!wanted(name.c_str())) return;
      if (const char* error = launch()) printf("FAIL %s: %s\n", name.c_str(), error), ++failures;
      print_accesses(name.c_str(), problem.c_str());
    };
    report("batch_norm_stats", [&] {
      return cuda::launch_batch_stats(shape, y.buffer.data(), mean.buffer.data(), var.buffer.data(), workspace.data(),
                                      nullptr);
    });
    report("batch_norm_act", [&] {
      return cuda::launch_bn_act(shape, parameters, Activation::relu, y.buffer.data(), residual.buffer.data(),
                                 out.buffer.data(), nullptr);
    });
    report("batch_norm_backward", [&] {
      return cuda::launch_bn_act_backward(shape, parameters, Activation::relu, true, dout.buffer.data(),
                                          y.buffer.data(), residual.buffer.data(), out.buffer.data(),
                                          dgamma.buffer.data(), dbeta.buffer.data(), dresidual.buffer.data(),
                                          workspace.data(), nullptr);
    });
  }
}

}  // namespace
}  // namespace convext

int main(int argc, char** argv) {
  using namespace convext;
  cuda_on_cpu::config.traffic_only = cuda_on_cpu::config.count_accesses = true;
  const auto wanted = [&](const char* name) {
    for (int i = 1; i < argc; ++i) {
      if (strstr(name, argv[i])) return true;
    }
    return argc == 1;
  };
  for (const Variant* v : kVariants) {
    if (wanted(v->name)) run_variant(*v);
  }
  run_batch_norm("bf16", DType::kBFloat16, wanted);
  run_batch_norm("f32", DType::kFloat32, wanted);
  return testing::failures != 0;
}

// The CUDA kernels as Python sees them: the list, the selection, and launches on raw addresses.
//
// No torch here, so the library loads and selects on a machine without a GPU and under any torch; what owns memory and
// streams is convext/backends/native_cuda.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings_problem.h"
#include "cuda/batch_norm/batch_norm.h"
#include "cuda/cost.h"
#include "cuda/runtime.h"

namespace py = pybind11;

namespace convext {
namespace {

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

std::string describe(const ConvProblem& p) {
  const std::array<int32_t, 14> values = {p.n,        p.c,        p.h,     p.w,     p.k,     p.r,     p.s,
                                          p.stride_h, p.stride_w, p.pad_h, p.pad_w, p.dil_h, p.dil_w, p.groups};
  const char* const names[] = {"n",        "c",        "h",     "w",     "k",     "r",     "s",
                               "stride_h", "stride_w", "pad_h", "pad_w", "dil_h", "dil_w", "groups"};
  std::string text;
  for (size_t i = 0; i < values.size(); ++i) {
    text += std::string(i ? " " : "") + names[i] + "=" + std::to_string(values[i]);
  }
  return text;
}

// A kernel and a problem that it takes: a launch asks neither again. Whether rounding to tf32 is allowed is decided where
// the variant is selected.
struct Prepared {
  const Variant& variant;
  const ConvProblem problem;

  Prepared(int index, const Fields& fields) : variant(variant_at(index)), problem(problem_of(fields)) {
    if (const char* why = reject(variant, Device::kCUDA, variant.pass, problem)) {
      throw std::invalid_argument(std::string("convext: ") + variant.name + " rejects the problem: " + why);
    }
  }

  [[noreturn]] void failed(const char* error) const {
    throw std::runtime_error(std::string("convext: ") + variant.name + " failed on " + describe(problem) + ": " +
                             error);
  }
};

// False: launches end before they reach the device, for timing what a call costs the host where no GPU is.
bool launching = true;

void launch(const Prepared& prepared, int device, uintptr_t stream, uintptr_t a, uintptr_t b, uintptr_t out,
            uintptr_t workspace, uintptr_t scale, uintptr_t shift, uintptr_t residual, int activation, uintptr_t w,
            uintptr_t dx, uintptr_t stats) {
  LaunchArgs args{};
  args.a = pointer(a), args.b = pointer(b), args.out = pointer(out), args.workspace = pointer(workspace);
  args.epilogue.scale = pointer(scale), args.epilogue.shift = pointer(shift);
  args.epilogue.residual = pointer(residual);
  args.epilogue.activation = static_cast<Activation>(activation);
  args.stream = pointer(stream);
  args.w = pointer(w), args.dx = pointer(dx), args.stats = pointer(stats);
  if (!launching) return;
  const cuda::OnDevice on_device(device);
  const char* error = on_device.error() ? on_device.error() : prepared.variant.launch(prepared.problem, args);
  if (error) prepared.failed(error);
}

// n c h w dtype layout of a dense activation tensor, and the addresses of mean, var, gamma, beta.
using Shape = std::array<int64_t, 6>;
using Channels = std::array<uintptr_t, 4>;

cuda::NormShape shape_of(const Shape& s) {
  const cuda::NormShape shape{s[0], s[1], s[2], s[3], static_cast<DType>(s[4]), static_cast<Layout>(s[5])};
  if (const char* why = cuda::reject_norm(shape)) {
    throw std::invalid_argument(std::string("convext: batch norm: ") + why);
  }
  return shape;
}
cuda::NormParameters parameters_of(const Channels& c, double eps) {
  return {pointer(c[0]), pointer(c[1]), pointer(c[2]), pointer(c[3]), eps};
}

// Runs f() with the device current; raises RuntimeError with the pass and its shape.
template <class F>
void run_norm(const char* pass, const cuda::NormShape& s, int device, F&& f) {
  if (!launching) return;
  const cuda::OnDevice on_device(device);
  const char* error = on_device.error() ? on_device.error() : f();
  if (!error) return;
  throw std::runtime_error(std::string("convext: ") + pass + " failed on n=" + std::to_string(s.n) +
                           " c=" + std::to_string(s.c) + " h=" + std::to_string(s.h) + " w=" + std::to_string(s.w) +
                           ": " + error);
}

void batch_stats(const Shape& s, int device, uintptr_t stream, uintptr_t y, uintptr_t mean, uintptr_t var,
                 uintptr_t workspace) {
  const cuda::NormShape shape = shape_of(s);
  run_norm("batch_stats", shape, device, [&] {
    return cuda::launch_batch_stats(shape, pointer(y), pointer(mean), pointer(var), pointer(workspace),
                                    pointer(stream));
  });
}

void merge_stats(int64_t k, int64_t rows, int dtype, int device, uintptr_t stream, uintptr_t partial, uintptr_t mean,
                 uintptr_t var) {
  run_norm("merge_stats", {rows, k, 1, 1, static_cast<DType>(dtype), Layout::kNHWC}, device, [&] {
    return cuda::launch_merge_stats(k, rows, static_cast<DType>(dtype), pointer(partial), pointer(mean), pointer(var),
                                    pointer(stream));
  });
}

void bn_act(const Shape& s, int device, uintptr_t stream, const Channels& channels, double eps, int activation,
            uintptr_t y, uintptr_t residual, uintptr_t out) {
  const cuda::NormShape shape = shape_of(s);
  run_norm("bn_act", shape, device, [&] {
    return cuda::launch_bn_act(shape, parameters_of(channels, eps), static_cast<Activation>(activation), pointer(y),
                               pointer(residual), pointer(out), pointer(stream));
  });
}

void bn_act_backward(const Shape& s, int device, uintptr_t stream, const Channels& channels, double eps, int activation,
                     bool training, uintptr_t dout, uintptr_t y, uintptr_t residual, uintptr_t dy, uintptr_t dgamma,
                     uintptr_t dbeta, uintptr_t dresidual, uintptr_t workspace) {
  const cuda::NormShape shape = shape_of(s);
  run_norm("bn_act_backward", shape, device, [&] {
    return cuda::launch_bn_act_backward(shape, parameters_of(channels, eps), static_cast<Activation>(activation),
                                        training, pointer(dout), pointer(y), pointer(residual), pointer(dy),
                                        pointer(dgamma), pointer(dbeta), pointer(dresidual), pointer(workspace),
                                        pointer(stream));
  });
}

// An fprop with a batch norm in inference behind it, which is folded first: into `folded`, scale and shift of K channels
// each.
void launch_folded(const Prepared& prepared, int device, uintptr_t stream, uintptr_t x, uintptr_t w, uintptr_t y,
                   uintptr_t workspace, uintptr_t folded, const Channels& channels, double eps, uintptr_t bias,
                   uintptr_t residual, int activation) {
  const ConvProblem& problem = prepared.problem;
  const DType accumulate = problem.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const uintptr_t shift = folded + problem.k * dtype_size(accumulate);
  if (launching) {
    const cuda::OnDevice on_device(device);
    const char* error = on_device.error();
    if (!error) {
      error = cuda::launch_fold(problem.k, accumulate, parameters_of(channels, eps), pointer(bias), pointer(folded),
                                pointer(shift), pointer(stream));
    }
    if (error) prepared.failed(error);
  }
  launch(prepared, device, stream, x, w, y, workspace, folded, shift, residual, activation, 0, 0, 0);
}

}  // namespace

PYBIND11_MODULE(_CUDA, m) {
  m.doc() = "libconvext_cuda for Python: list of kernels, selection, launches on raw addresses.";
  m.def("variants", [] {
    py::list all;
    for (const Variant* v : variants()) all.append(facts(*v));
    return all;
  }, "Every CUDA kernel, as dicts, in the order of their indices.");
  m.def(
      "select",
      [](int pass, const Fields& fields, bool tf32) {
    const ConvProblem problem = problem_of(fields);
    const int index = select(Device::kCUDA, static_cast<Pass>(pass), problem, tf32);
    return std::pair<int, double>(index, index < 0 ? 0.0 : variants()[index]->cost(*variants()[index], problem));
  }, py::arg("pass_"), py::arg("fields"), py::arg("tf32"),
      "(index of the kernel that serves the problem, its modelled cost), or (-1, 0). tf32: whether operands of float32 "
      "may be rounded to it.");
  m.def("accepted",
        [](int pass, const Fields& fields, bool tf32) {
    const ConvProblem problem = problem_of(fields);
    std::vector<std::pair<int, double>> taken;
    for (int i = 0; i < static_cast<int>(variants().size()); ++i) {
      const Variant& v = *variants()[i];
      if (!reject(v, Device::kCUDA, static_cast<Pass>(pass), problem, tf32)) taken.emplace_back(i, v.cost(v, problem));
    }
    return taken;
  }, py::arg("pass_"), py::arg("fields"), py::arg("tf32"),
        "(index, modelled cost) of every kernel that takes the problem.");
  m.def("copy_cost", &cuda::copy_cost, "Modelled cost of a copy that changes the memory order of so many bytes.");
  m.def("reject_reasons",
        [](int pass, const Fields& fields, bool tf32) {
    return reject_reasons(Device::kCUDA, static_cast<Pass>(pass), problem_of(fields), tf32);
  }, py::arg("pass_"), py::arg("fields"), py::arg("tf32"),
        "(kernel, reason) for every kernel of the pass that does not take the problem.");
  m.def("weight_order", [](int index, const Fields& fields) { return pack_format(index, problem_of(fields)); },
        "\"krsc\" where the kernel reads (or, for wgrad, writes) weights in that order, None for KCRS.");
  m.def("workspace", [](int index, const Fields& fields) {
    const Variant& v = variant_at(index);
    return v.workspace ? v.workspace(problem_of(fields), 1) : int64_t{0};
  }, "Bytes of scratch memory that the launch needs.");
  // None of them touches Python, and the driver may make them wait.
  using WithoutGil = py::call_guard<py::gil_scoped_release>;
  py::class_<Prepared>(m, "Prepared", "A kernel and a problem that it takes; ValueError, with the reason, if not.")
      .def(py::init<int, const Fields&>(), py::arg("index"), py::arg("fields"));
  m.def("set_launching", [](bool wish) { launching = wish; },
        "False: every launch ends before it reaches the device, for timing the host where no GPU is.");
  m.def("launch", &launch, WithoutGil(),
        "Launches a kernel on device addresses; raises RuntimeError naming kernel and problem.");
  m.def("launch_folded", &launch_folded, WithoutGil(),
        "Launches scale and shift of a bias and a batch norm in inference, and an fprop with them in its epilogue.");
  m.def("norm_workspace", [](const Shape& s) { return cuda::norm_workspace(shape_of(s)); },
        "Bytes of scratch memory for batch_stats and bn_act_backward.");
  m.def("batch_stats", &batch_stats, WithoutGil(), "Launches the per-channel statistics of y.");
  m.def("stats_rows", [](int index, const Fields& fields) {
    const Variant& v = variant_at(index);
    return v.stats_rows ? v.stats_rows(problem_of(fields)) : int64_t{0};
  }, "Rows of partial statistics that the fprop kernel can write; 0 where it cannot.");
  m.def("merge_stats", &merge_stats, WithoutGil(),
        "Launches mean and biased variance out of an fprop kernel's partial statistics.");
  m.def("bn_act", &bn_act, WithoutGil(), "Launches normalisation, residual and activation.");
  m.def("bn_act_backward", &bn_act_backward, WithoutGil(), "Launches the gradients of bn_act.");
  m.def("activations", &activation_names,
        "Names of the fused activations; the position is the number that launch takes.");
}

}  // namespace convext

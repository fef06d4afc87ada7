// What Python may know about the kernels: the list, who takes a problem and why not, CPU features, how it was built.
// No tensors here and no torch header: torch's bundled pybind11 refuses stable-ABI builds before 2.13.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings_problem.h"
#include "core/chain.h"
#include "cpu/runtime/block.h"
#include "cpu/runtime/direct.h"
#include "cpu/runtime/machine.h"
#include "cpu/runtime/output_pool.h"
#include "cpu/runtime/packed_weight.h"
#include "cpu/runtime/sequence_program.h"
#include "guards.h"
#include "places.h"

namespace py = pybind11;

namespace convext {
namespace {

#define CONVEXT_X(name) #name,
std::vector<std::string> work_terms() { return {CONVEXT_WORK(CONVEXT_X)}; }
std::vector<std::string> chain_operation_names() { return {CONVEXT_CHAIN_OPERATIONS(CONVEXT_X)}; }
#undef CONVEXT_X

void set_isa(const std::optional<std::string>& name) {
  if (!name) {
    settings().cpu_isa = detect_cpu_isa();
    return;
  }
  for (const Isa isa : {Isa::kPortable, Isa::kAVX2, Isa::kAVX512, Isa::kAVX512BF16}) {
    if (*name != isa_name(isa)) continue;
    if (isa > detect_cpu_isa()) {
      throw std::invalid_argument("isa '" + *name + "' is not offered by this CPU and build (" +
                                  isa_name(detect_cpu_isa()) + " is the best)");
    }
    settings().cpu_isa = isa;
    return;
  }
  throw std::invalid_argument("isa must be portable, avx2, avx512 or avx512_bf16, got '" + *name + "'");
}

std::map<std::string, bool> cpu_features() {
  std::map<std::string, bool> features;
#if defined(CONVEXT_HAVE_X86_ISAS)
  __builtin_cpu_init();
#define CONVEXT_FEATURE(name) features[name] = __builtin_cpu_supports(name) != 0;
  CONVEXT_FEATURE("sse4.2")
  CONVEXT_FEATURE("avx2")
  CONVEXT_FEATURE("fma")
  CONVEXT_FEATURE("avx512f")
  CONVEXT_FEATURE("avx512bw")
  CONVEXT_FEATURE("avx512dq")
  CONVEXT_FEATURE("avx512vl")
  CONVEXT_FEATURE("avx512bf16")
#undef CONVEXT_FEATURE
#endif
  return features;
}

// The problem that a CPU kernel sees: tensors are staged into NHWC where it asks for that.
ConvProblem served(const Fields& fields) { return flattened(problem_of(fields)).problem; }

void bind_kernels(py::module_& m) {
  m.def("variants", [] {
    py::list all;
    for (const Variant* v : variants()) all.append(facts(*v));
    return all;
  }, "Every compiled kernel, as dicts, in the order of their indices.");
  m.def("select", [](int device, int pass, const Fields& problem) {
    return select(static_cast<Device>(device), static_cast<Pass>(pass), served(problem));
  }, "Index of the kernel that serves the problem, whose layouts are those it arrives in, or -1.");
  m.def("reject_reasons", [](int device, int pass, const Fields& problem) {
    return reject_reasons(static_cast<Device>(device), static_cast<Pass>(pass), served(problem));
  }, "(kernel, reason) for every kernel of the device and pass that does not take the problem.");
  m.def("accepted", [](int device, int pass, const Fields& fields) {
    const ConvProblem problem = served(fields);
    std::vector<std::pair<int, double>> taken;
    for (int i = 0; i < static_cast<int>(variants().size()); ++i) {
      const Variant& v = *variants()[i];
      if (!reject(v, static_cast<Device>(device), static_cast<Pass>(pass), problem)) {
        taken.emplace_back(i, cost_of(v, problem));
      }
    }
    return taken;
  }, "(index, modelled seconds) of every kernel that takes the problem, whose layouts are those it arrives in.");
  m.def("cost", [](int index, const Fields& fields) { return cost_of(variant_at(index), served(fields)); },
        "Modelled seconds of a kernel that takes the problem, whose layouts are those it arrives in.");
  m.def("work", [](int index, const Fields& fields) {
    const Work work = work_of(variant_at(index), served(fields));
    return std::vector<double>(std::begin(work.of), std::end(work.of));
  }, "What a launch of the kernel does, a count for each of work_terms(); the problem's layouts are those it arrives in.");
  m.def("work_terms", &work_terms, "Names of the terms of a kernel's work (core/work.h).");
  m.def("set_costs", [](const std::vector<std::array<double, kTerms>>& seconds) {
    if (seconds.size() != variants().size()) {
      throw std::invalid_argument("seconds must have a row for each of " + std::to_string(variants().size()) +
                                  " kernels, got " + std::to_string(seconds.size()));
    }
    std::vector<Work> costs(seconds.size());
    for (size_t i = 0; i < seconds.size(); ++i) {
      for (int term = 0; term < kTerms; ++term) {
        if (!(seconds[i][term] >= 0) || std::isinf(seconds[i][term])) {
          throw std::invalid_argument("seconds of a term must be finite and not negative, got " +
                                      std::to_string(seconds[i][term]) + " for " + variants()[i]->name);
        }
        costs[i].of[term] = seconds[i][term];
      }
    }
    set_costs(std::move(costs));
  }, py::arg("seconds"), "Seconds that one of each term takes, a row for each kernel in the order of variants().");
  m.def("pack_format", [](int index, const Fields& problem) { return pack_format(index, served(problem)); },
        "Name of the packed order that the kernel wants its weights in, or None for KCRS as it is.");
  m.def("packed_size", [](int index, const Fields& problem) {
    const Variant& v = variant_at(index);
    return v.packed_size ? v.packed_size(served(problem)) : int64_t{0};
  }, "Bytes of the packed weights.");
  m.def("output_size", [](const Fields& fields) {
    const ConvProblem p = problem_of(fields);
    return std::pair<int32_t, int32_t>(p.p(), p.q());
  }, "(P, Q) of the problem.");
  m.def("gemm_shape", [](int pass, const Fields& fields) {
    const GemmShape g = problem_of(fields).gemm_shape(static_cast<Pass>(pass));
    return std::array<int64_t, 3>{g.m, g.n, g.k};
  }, "(gemm_m, gemm_n, gemm_k) per group.");
}

void bind_sequences(py::module_& m) {
  m.def("reject_block",
        [](const std::vector<Fields>& problems, const std::vector<bool>& excites) -> std::optional<std::string> {
    std::vector<BlockStep> steps(problems.size());
    for (size_t i = 0; i < problems.size(); ++i) {
      steps[i].problem = problem_of(problems[i]);
      steps[i].excites = excites.at(i);
      steps[i].excite.c = steps[i].problem.c;
    }
    if (const char* why = reject_block(steps)) return why;
    return std::nullopt;
  }, "Why forward convolutions in a row cannot run as one block, or None; excites: squeeze and excitation before it.");
  py::class_<SequenceProgram, std::shared_ptr<SequenceProgram>>(
      m, "SequenceProgram", "What several convolutions in one call are (csrc/cpu/runtime/sequence_program.h).")
      .def(py::init(&SequenceProgram::make))
      .def_property_readonly("number", &SequenceProgram::number, "What the ops know it by, as long as it lives.")
      .def_property_readonly("tensors", &SequenceProgram::tensors, "How many tensors its steps have.")
      .def("begin_block", &SequenceProgram::begin_block, py::arg("source"), "A block of steps, which reads that value.")
      .def("add_convolution", &SequenceProgram::add_convolution, py::arg("variant"), py::arg("geom"),
           py::arg("activation"), py::arg("packs"), py::arg("residual"), py::arg("present"), py::arg("excite"))
      .def("add_layer_norm", &SequenceProgram::add_layer_norm, py::arg("gamma"), py::arg("beta"))
      .def("add_mean", &SequenceProgram::add_mean);
}

void bind_machine(py::module_& m) {
  m.def("cpu_features", &cpu_features, "What the CPU offers, by name.");
  m.def("isa", [] { return isa_name(settings().cpu_isa); }, "The instruction set in use.");
  m.def("best_isa", [] { return isa_name(detect_cpu_isa()); }, "The best instruction set of this CPU and build.");
  m.def("set_isa", &set_isa, py::arg("name"),
        "Caps the instruction set: portable, avx2, avx512, avx512_bf16, or None for the best.");
  m.def("fma_peak", [](int dtype, double seconds) { return roofline().fma_flops(static_cast<DType>(dtype), seconds); },
        py::arg("dtype") = 0, py::arg("seconds") = 0.2, py::call_guard<py::gil_scoped_release>(),
        "FLOP/s that one thread reaches on independent FMAs: the ceiling of every kernel.");
  m.def("copy_bandwidth",
        [](int64_t bytes, double seconds) {
    if (bytes < 4096) throw std::invalid_argument("bytes must be at least 4096, got " + std::to_string(bytes));
    std::vector<float> dst(bytes / sizeof(float)), src(bytes / sizeof(float), 1.0f);
    return roofline().copy_bytes(dst.data(), src.data(), bytes, seconds);
  }, py::arg("bytes") = int64_t{128} << 20, py::arg("seconds") = 0.2, py::call_guard<py::gil_scoped_release>(),
        "Bytes a second, read plus written, that one thread copies between buffers of this size.");
}

void bind_guards(py::module_& m) {
  const auto collected = py::custom_type_setup([](PyHeapTypeObject* heap_type) {
    PyTypeObject& type = heap_type->ht_type;
    type.tp_flags |= Py_TPFLAGS_HAVE_GC;
    type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) -> int {
      Py_VISIT(Py_TYPE(self));
      return py::detail::is_holder_constructed(self) ? py::cast<Guards&>(py::handle(self)).traverse(visit, arg) : 0;
    };
    type.tp_clear = [](PyObject* self) -> int {
      if (py::detail::is_holder_constructed(self)) py::cast<Guards&>(py::handle(self)).clear();
      return 0;
    };
  });
  py::class_<Guards>(m, "Guards", collected, "Facts about Python objects, checked together, which it keeps alive.")
      .def(py::init<>())
      .def("item", &Guards::item, py::arg("dict").none(), py::arg("key"), py::arg("value"),
           "dict[key] is value, or an equal number, string or tuple of such")
      .def("absent", &Guards::absent, py::arg("dict").none(), py::arg("key"), "there is no dict[key]")
      .def("item_type", &Guards::item_type, py::arg("dict").none(), py::arg("key"), py::arg("kind"),
           "type(dict[key]) is kind")
      .def("contents", &Guards::contents, py::arg("dict").none(), py::arg("keys"), py::arg("values"),
           "dict holds these keys and values in this order and nothing else")
      .def("kinds", &Guards::kinds, py::arg("dict").none(), py::arg("keys"), py::arg("types"),
           "dict holds these keys in this order, and values of exactly these types")
      .def("filled", &Guards::filled, py::arg("dict").none(), py::arg("key"), py::arg("expected"),
           "bool(dict[key]) is expected, dict[key] being a dictionary itself")
      .def("elements", &Guards::elements, py::arg("list"), py::arg("values"), "the list holds these objects, in order")
      .def("members", &Guards::members, py::arg("set"), py::arg("members"), "set == members")
      .def("type", &Guards::type, py::arg("object").none(), py::arg("kind"), "type(object) is kind")
      .def("dict_of", &Guards::dict_of, py::arg("object").none(), py::arg("dict"), "vars(object) is dict")
      .def("class_item", &Guards::class_item, py::arg("kind"), py::arg("name"), py::arg("value"),
           "what the class, or the first of its bases that has it, says of a name is value")
      .def("class_absent", &Guards::class_absent, py::arg("kind"), py::arg("name"),
           "neither the class nor a base has the name")
      .def("function", &Guards::function, py::arg("function"), py::arg("code"), py::arg("defaults"),
           "a function's code and (defaults, defaults by name), None where there are none, are these")
      .def("cell", &Guards::cell, py::arg("cell"), py::arg("value"), "a closure's cell holds value")
      .def("attribute", &Guards::attribute, py::arg("object").none(), py::arg("name"), py::arg("value"),
           "getattr(object, name) is value")
      .def("holds", &Guards::holds, py::arg("owner") = py::none(),
           "Whether every fact still stands. None in a fact's place stands for the owner, or its dictionary.")
      .def("broken", &Guards::broken, py::arg("owner") = py::none(), "(kind, key) of the first that does not, or None.")
      .def("__len__", &Guards::size);
}

void bind_memory(py::module_& m) {
  py::class_<PackedWeight::Owner>(m, "PackedWeight", "Keeps all packings of one weight tensor while it lives.")
      .def(py::init<>())
      .def("number", &PackedWeight::Owner::number, "What the operators know it by.")
      .def("forget", [](PackedWeight::Owner& self) { self->forget(); }, py::call_guard<py::gil_scoped_release>(),
           "The next use packs anew.")
      .def("bytes", [](PackedWeight::Owner& self) { return self->bytes(); }, "Bytes of all packings.");
  py::class_<Places>(m, "Places", "Address, extents, strides, dtype and device of tensors that it does not keep alive.")
      .def(py::init<const py::capsule&, const py::list&>(), py::arg("exchange"), py::arg("tensors"))
      .def("still", &Places::still, py::arg("tensors"), "Whether those of the same tensors are what they were.");
  m.def("output_pool_limit", [] { return OutputPool::of_process().limit(); }, "Bytes that the pool may keep.");
  m.def("set_output_pool_limit", [](int64_t bytes) {
    if (bytes < 0) throw std::invalid_argument("bytes must not be negative, got " + std::to_string(bytes));
    OutputPool::of_process().set_limit(bytes);
  }, py::arg("bytes"));
  m.def("output_pool_kept", [] { return OutputPool::of_process().kept(); }, "Bytes that the pool keeps now.");
  m.def("direct_calls", [] { return reinterpret_cast<uintptr_t>(&direct_calls()); },
        "The address of the DirectCalls, for convext._call.");
  m.def("use_storage",
        [](uintptr_t make_resizable) {
    OutputPool::of_process().set_make_resizable(reinterpret_cast<OutputPool::MakeResizable>(make_resizable));
  }, py::arg("make_resizable"),
        "Lets results lie in the pool: with the address of convext_make_resizable, or 0 for none.");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "What Python may know of libconvext: kernel list, selection, guards, build information.";
  bind_kernels(m);
  bind_sequences(m);
  bind_machine(m);
  bind_guards(m);
  bind_memory(m);
  m.def("accuracy", [] { return static_cast<int>(settings().accuracy); },
        "Which algorithms may run: 0 all, 1 those within a plain sum's error, 2 plain sums.");
  m.def("set_accuracy", [](int accuracy) {
    if (accuracy < 0 || accuracy > 2) throw std::invalid_argument("no accuracy " + std::to_string(accuracy));
    settings().accuracy = static_cast<Accuracy>(accuracy);
  }, py::arg("accuracy"));
  m.def("activations", &activation_names,
        "Names of the fused activations; the position is the number that the ops take.");
  m.def("chain_operations", &chain_operation_names,
        "Names of the operations of a chain (core/chain.h); the position is the number that the op takes.");
  m.def("build_info", [] {
    return std::map<std::string, std::string>{
        {"torch", CONVEXT_BUILT_WITH_TORCH}, {"compiler", CONVEXT_BUILT_WITH_COMPILER}, {"cuda", CONVEXT_CUDA_PLAN}};
  }, "What this library was built with.");
}

}  // namespace convext

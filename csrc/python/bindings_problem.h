// What the bindings of both libraries share: problems and variants as Python hands them over.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/select.h"

namespace convext {

// The fields of ConvProblem in order: n c h w  k r s  stride pad dil (h, w each)  groups dtype x_layout y_layout, and of
// the third axis d t  stride pad dil.
using Fields = std::array<int64_t, 22>;

inline ConvProblem problem_of(const Fields& f) {
  for (int64_t value : f) {
    if (value < 0 || value > INT32_MAX) throw std::invalid_argument("convext: a field of the problem exceeds 32 bits");
  }
  const auto at = [&](int i) { return static_cast<int32_t>(f[i]); };
  ConvProblem p{};
  p.n = at(0), p.c = at(1), p.h = at(2), p.w = at(3);
  p.k = at(4), p.r = at(5), p.s = at(6);
  p.stride_h = at(7), p.stride_w = at(8), p.pad_h = at(9), p.pad_w = at(10), p.dil_h = at(11), p.dil_w = at(12);
  p.groups = at(13);
  p.dtype = static_cast<DType>(f[14]);
  p.x_layout = static_cast<Layout>(f[15]), p.y_layout = static_cast<Layout>(f[16]);
  p.d = at(17), p.t = at(18), p.stride_d = at(19), p.pad_d = at(20), p.dil_d = at(21);
  return p;
}

inline const Variant& variant_at(int index) {
  if (index < 0 || index >= static_cast<int>(variants().size())) {
    throw std::out_of_range("convext: there is no variant " + std::to_string(index));
  }
  return *variants()[index];
}

// The order that the variant wants its weights in, or nothing for KCRS as it is.
inline std::optional<std::string> pack_format(int index, const ConvProblem& problem) {
  const Variant& variant = variant_at(index);
  const char* format = variant.pack_format ? variant.pack_format(problem) : nullptr;
  return format ? std::optional<std::string>(format) : std::nullopt;
}

#define CONVEXT_X(name) #name,
inline std::vector<std::string> activation_names() { return {CONVEXT_ACTIVATIONS(CONVEXT_X)}; }

inline std::string isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAVX2: return "avx2";
    case Isa::kAVX512: return "avx512";
    case Isa::kAVX512BF16: return "avx512_bf16";
    case Isa::kSM80: return "sm80";
    case Isa::kSM90: return "sm90";
    default: return "portable";
  }
}

// What a kernel says about itself, for Python to decide by: nobody takes its name apart.
inline pybind11::dict facts(const Variant& v) {
  static const char* const algorithms[] = {CONVEXT_ALGORITHMS(CONVEXT_X)};
  static const char* const arithmetics[] = {CONVEXT_ARITHMETICS(CONVEXT_X)};
  pybind11::dict d;
  d["name"] = v.name;
  d["algorithm"] = algorithms[static_cast<int>(v.algorithm)];
  d["device"] = v.device == Device::kCPU ? "cpu" : "cuda";
  d["pass"] = static_cast<int>(v.pass);
  d["dtype"] = static_cast<int>(v.dtype);
  d["arithmetic"] = arithmetics[static_cast<int>(v.arithmetic)];
  d["isa"] = isa_name(v.isa);
  d["tile"] = v.tile;
  d["block"] = std::array<int32_t, 3>{v.block_m, v.block_n, v.block_k};
  d["gathers"] = v.gathers;
  d["reads_nchw"] = v.layouts == Layouts::kAny;
  d["writes_dx"] = v.wgrad_writes_dx;
  return d;
}
#undef CONVEXT_X

}  // namespace convext

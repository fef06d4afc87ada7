// fprop and dgrad in terms of implicit_gemm.h: what the direct and the dilated variants have in common.
#pragma once
#include "cpu/kernels/family.h"
#include "implicit_gemm.h"

namespace convext::CONVEXT_ISA {

constexpr int64_t align64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// What both passes say of the product; the axes are left to them. Clears the row of zeros that padding
// taps read, at the start of the workspace.
template <class T>
ImplicitGemm<T> gemm_of(const ConvProblem& p, const LaunchArgs& args, bool dgrad, int64_t zeros,
                        bool tiles_within_rows) {
  ImplicitGemm<T> g;
  g.in = static_cast<const T*>(args.a), g.out = static_cast<T*>(args.out), g.packed = static_cast<const T*>(args.b);
  T* const row = static_cast<T*>(args.workspace);
  for (int64_t i = 0; i < zeros; ++i) row[i] = T{};
  g.zeros = row;
  g.batch = p.n;
  g.filter_height = p.r, g.filter_width = p.s;
  g.packed_taps = static_cast<int32_t>(p.taps());
  g.epilogue = args.epilogue;
  g.in_pitch = dgrad ? p.k : p.c, g.out_pitch = dgrad ? p.c : p.k;
  g.groups = p.groups, g.depth = g.in_pitch / p.groups, g.columns = g.out_pitch / p.groups;
  g.tiles_within_rows = tiles_within_rows;
  return g;
}

// y[n,z,p,q,:] = epilogue(sum_{t,r,s} x[n,d,h,w,:] * W[t,r,s]), W[t,r,s] of shape (C, K) a group.
template <class T, bool TILES_WITHIN_ROWS>
struct GemmFprop {
  static const char* pack_format(const ConvProblem& p) {
    return merged_taps(p) > 1 ? CONVEXT_FORMAT_NAME(T, fprop_merged_panels) : CONVEXT_FORMAT_NAME(T, fprop_panels);
  }

  static int64_t packed_size(const ConvProblem& p) {
    const int32_t merged = merged_taps(p);
    return packed_elements<T>(p.groups, p.taps() / merged, merged * p.c_per_group(), p.k_per_group()) * sizeof(T);
  }

  static void pack(const ConvProblem& p, const void* w, void* packed, const Parallel& parallel) {
    const int64_t taps = p.taps(), filter = taps * p.c_per_group();
    pack_panels(static_cast<const T*>(w), p.k_per_group() * filter, filter, taps, p.groups, static_cast<int32_t>(taps),
                merged_taps(p), p.c_per_group(), p.k_per_group(), static_cast<T*>(packed), parallel);
  }

  // With few channels the loop over one tap is too short to pay for its set-up. In NHWC the taps of one filter row are
  // contiguous, so they merge into one tap of s * c channels, provided that no tap of the row is padding: the image is
  // copied once into rows that are wide enough.
  static bool merges_filter_row(const ConvProblem& p) { return p.groups == 1 && p.s > 1 && p.dil_w == 1 && p.c <= 8; }
  static int32_t merged_taps(const ConvProblem& p) { return merges_filter_row(p) ? p.s : 1; }
  static int64_t zeros(const ConvProblem& p) { return merges_filter_row(p) ? int64_t{p.s} * p.c : p.c; }
  static int64_t wide(const ConvProblem& p) { return int64_t{p.w} + 2 * p.pad_w; }

  static int64_t workspace(const ConvProblem& p, int32_t) {
    const bool copies = merges_filter_row(p) && p.pad_w > 0;
    return align64(zeros(p) * sizeof(T)) + (copies ? int64_t{p.n} * p.d * p.h * wide(p) * p.c * sizeof(T) : 0);
  }

  static const char* launch(const ConvProblem& p, const LaunchArgs& args) {
    ImplicitGemm<T> g = gemm_of<T>(p, args, false, zeros(p), TILES_WITHIN_ROWS);
    g.planes = depth_of(p, false).at(0);
    g.height = height_of(p, false).at(0);
    g.width = width_of(p, false).at(0);
    if (merges_filter_row(p)) {
      if (p.pad_w > 0) g.in = widen(p, args);
      g.width = Axis::fprop(static_cast<int32_t>(wide(p)), p.q(), 1, p.stride_w, 0, 1);
      g.filter_width = 1;
      g.packed_taps = p.t * p.r;
      g.depth = p.s * p.c;
    } else if (p.is_pointwise() && p.is_unit_stride() && p.pad_d == 0 && p.pad_h == 0 && p.pad_w == 0 &&
               p.nhw() <= INT32_MAX) {
      // All pixels are one row: their pointers are a single run, and tiles go across the ends of rows and images.
      const int32_t pixels = static_cast<int32_t>(p.nhw());
      g.batch = 1;
      g.planes = g.height = Axis::fprop(1, 1, 1, 1, 0, 1);
      g.width = Axis::fprop(pixels, pixels, 1, 1, 0, 1);
    }
    run_implicit_gemm(g, *args.parallel);
    return nullptr;
  }

 private:
  // x with pad_w zero pixels on either side of each row.
  static const T* widen(const ConvProblem& p, const LaunchArgs& args) {
    const T* x = static_cast<const T*>(args.a);
    T* copy = reinterpret_cast<T*>(static_cast<char*>(args.workspace) + align64(zeros(p) * sizeof(T)));
    const int64_t line = int64_t{p.w} * p.c, pad = int64_t{p.pad_w} * p.c;
    args.parallel->for_each(int64_t{p.n} * p.d * p.h, [=](int64_t i) {
      T* to = copy + i * (line + 2 * pad);
      const T* from = x + i * line;
      for (int64_t k = 0; k < pad; ++k) to[k] = T{};
      for (int64_t k = 0; k < line; ++k) to[pad + k] = from[k];
      for (int64_t k = 0; k < pad; ++k) to[pad + line + k] = T{};
    });
    return copy;
  }
};

// dx[n,d,h,w,:] = epilogue(sum_{t,r,s} dy[n,z,p,q,:] * W[t,r,s]^T), one problem of unit stride for each residue of
// (d, h, w) modulo the stride: every product that is formed is one that counts.
template <class T, bool TILES_WITHIN_ROWS>
struct GemmDgrad {
  static const char* pack_format(const ConvProblem&) { return CONVEXT_FORMAT_NAME(T, dgrad_panels); }

  static int64_t packed_size(const ConvProblem& p) {
    return packed_elements<T>(p.groups, p.taps(), p.k_per_group(), p.c_per_group()) * sizeof(T);
  }

  static void pack(const ConvProblem& p, const void* w, void* packed, const Parallel& parallel) {
    const int64_t taps = p.taps(), filter = taps * p.c_per_group();
    pack_panels(static_cast<const T*>(w), p.k_per_group() * filter, taps, filter, p.groups, static_cast<int32_t>(taps),
                1, p.k_per_group(), p.c_per_group(), static_cast<T*>(packed), parallel);
  }

  static int64_t workspace(const ConvProblem& p, int32_t) { return align64(p.k * int64_t{sizeof(T)}); }

  static const char* launch(const ConvProblem& p, const LaunchArgs& args) {
    ImplicitGemm<T> g = gemm_of<T>(p, args, true, p.k, TILES_WITHIN_ROWS);
    const AxisClasses planes = depth_of(p, true), rows = height_of(p, true), columns = width_of(p, true);
    for (int32_t l = 0; l < planes.count(); ++l) {
      g.planes = planes.at(l);
      for (int32_t i = 0; i < rows.count(); ++i) {
        g.height = rows.at(i);
        for (int32_t j = 0; j < columns.count(); ++j) {
          g.width = columns.at(j);
          run_implicit_gemm(g, *args.parallel);
        }
      }
    }
    return nullptr;
  }
};

// The Variant of a pass that packs its weights.
template <class T, class PassImpl>
constexpr Variant packed_variant(const char* name, Algorithm algorithm, Pass pass,
                                 const char* (*reject)(const ConvProblem&),
                                 void (*work)(const Variant&, const ConvProblem&, Work&)) {
  Variant v =
      packed_by<PassImpl>(cpu_variant<T>(name, algorithm, pass, reject, PassImpl::launch, work, PassImpl::workspace));
  if (kDType<T> == DType::kBFloat16) v.arithmetic = Arithmetic::bfloat16;
  return v;
}

}  // namespace convext::CONVEXT_ISA

// dgrad of groups of few channels at unit stride: fprop of the mirrored problem (grouped_fprop.cpp), filters and
// channels exchanged, taps in the opposite order.
//
//   dx[n,h,w,c] = sum_{r,s,k} dy[n, h + pad_h - r*dil_h, w + pad_w - s*dil_w, k] * w[k,r,s,c]
#include "grouped_fprop.h"

namespace convext::CONVEXT_ISA {
namespace {

ConvProblem mirrored(const ConvProblem& p) {
  ConvProblem m = p;
  m.c = p.k, m.k = p.c;
  m.h = p.p(), m.w = p.q();
  m.pad_h = p.dil_h * (p.r - 1) - p.pad_h;
  m.pad_w = p.dil_w * (p.s - 1) - p.pad_w;
  return m;
}

const char* reject(const ConvProblem& p) {
  if (!p.is_unit_stride()) return "the stride is not 1";
  const ConvProblem m = mirrored(p);
  if (m.pad_h < 0 || m.pad_w < 0) return "the padding is wider than the filter";
  return reject_unless_grouped(m);
}

struct Packing {
  static const char* pack_format(const ConvProblem&) { return "grouped_mirrored_" CONVEXT_STRING(CONVEXT_ISA); }
  static int64_t packed_size(const ConvProblem& p) { return grouped_packed_size(mirrored(p)); }

  static void pack(const ConvProblem& p, const void* w, void* packed, const Parallel&) {
    const float* from = static_cast<const float*>(w);
    float* to = static_cast<float*>(packed);
    const int32_t cg = p.c_per_group(), kg = p.k_per_group(), taps = p.r * p.s;
    for (int32_t first = 0; first < p.c; first += Vec<float>::width) {
      for (int32_t tap = taps - 1; tap >= 0; --tap) {
        for (int32_t k = 0; k < kg; ++k) {
          for (int32_t c = first; c < first + Vec<float>::width; ++c) {
            *to++ = c < p.c ? from[((int64_t{c} / cg * kg + k) * cg + c % cg) * taps + tap] : 0;
          }
        }
      }
    }
  }
};

const char* launch(const ConvProblem& p, const LaunchArgs& args) {
  run_grouped(mirrored(p), static_cast<const float*>(args.a), static_cast<const float*>(args.b),
              static_cast<float*>(args.out), args.epilogue, *args.parallel);
  return nullptr;
}

}  // namespace
}  // namespace convext::CONVEXT_ISA

CONVEXT_DEFINE_VARIANT_OF(float, f32, dgrad_grouped,
                          packed_by<Packing>(cpu_variant<T>(name, Algorithm::grouped, Pass::kDgrad, reject, launch,
                                                            grouped_work)))

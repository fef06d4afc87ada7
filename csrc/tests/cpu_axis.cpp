// Stand-alone test of the index map (core/axis.h) against the definition, tap by tap, over every small axis.
#include "core/axis.h"

#include <map>

#include "harness.h"

using namespace convext;
using namespace convext::testing;

namespace {

// Output -> {(tap of the filter, input that it meets)}; inputs in the padding among them.
using Meetings = std::map<int32_t, std::map<int32_t, int32_t>>;

Meetings of_classes(const AxisClasses& classes, bool ascending) {
  Meetings found;
  for (int32_t index = 0; index < classes.count(); ++index) {
    const Axis axis = ascending ? classes.at(index).ascending() : classes.at(index);
    check(axis.in == classes.in && axis.out == classes.out, "a class has its axis's extents");
    check(!ascending || axis.in_tap_step > 0, "inputs ascend");
    for (int32_t i = 0; i < axis.count; ++i) {
      check(found.count(axis.output(i)) == 0, "an output is in one class");
      auto& taps = found[axis.output(i)];
      for (int32_t t = 0; t < axis.taps; ++t) {
        check(taps.emplace(axis.tap(t), axis.input(i, t)).second, "a tap is met once");
      }
    }
  }
  return found;
}

void test(const ConvProblem& p) {
  Meetings fprop, dgrad;
  for (int32_t q = 0; q < p.q(); ++q) {
    for (int32_t s = 0; s < p.s; ++s) fprop[q][s] = p.w_of(q, s);
  }
  for (int32_t w = 0; w < p.w; ++w) {
    auto& taps = dgrad[w];
    for (int32_t s = 0; s < p.s; ++s) {
      // Every q, also outside of dy, that reads w through s.
      for (int32_t q = -p.w - p.s * p.dil_w; q <= p.w + 2 * p.pad_w; ++q) {
        if (p.w_of(q, s) == w) taps[s] = q;
      }
    }
  }
  const std::string what = "w " + std::to_string(p.w) + " s " + std::to_string(p.s) + " stride " +
                           std::to_string(p.stride_w) + " pad " + std::to_string(p.pad_w) + " dil " +
                           std::to_string(p.dil_w);
  for (const bool ascending : {false, true}) {
    check(of_classes(width_of(p, false), ascending) == fprop, "fprop of " + what);
    check(of_classes(width_of(p, true), ascending) == dgrad, "dgrad of " + what);
  }
}

}  // namespace

int main() {
  for (int32_t w = 1; w <= 9; ++w) {
    for (int32_t s = 1; s <= 5; ++s) {
      for (int32_t stride = 1; stride <= 6; ++stride) {
        for (int32_t pad = 0; pad <= 4; ++pad) {
          for (int32_t dil = 1; dil <= 6; ++dil) {
            ConvProblem p{};
            p.n = p.c = p.k = p.groups = p.h = p.r = p.stride_h = p.dil_h = 1;
            p.w = w, p.s = s, p.stride_w = stride, p.pad_w = pad, p.dil_w = dil;
            if (w + 2 * pad > dil * (s - 1)) test(p);
          }
        }
      }
    }
  }
  // Height has its own fields.
  ConvProblem p{};
  p.h = 7, p.r = 3, p.stride_h = 2, p.pad_h = 1, p.dil_h = 3;
  p.w = 9, p.s = 5, p.stride_w = 3, p.pad_w = 4, p.dil_w = 1;
  const Axis rows = height_of(p, false).at(0), columns = height_of(p, true).at(1);
  check(rows.in == 7 && rows.count == p.p() && rows.input(1, 2) == p.h_of(1, 2), "height of fprop");
  check(columns.in == p.p() && columns.out == 7 && columns.output(1) == 3, "height of dgrad");
  return summary();
}

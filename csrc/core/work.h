// What a launch of a CPU kernel does, in counts that follow from the problem: the kernel's family says how many of each
// (`Variant::work`). What one of each takes on a machine is data, a table that was measured (`set_costs` in select.h).
#pragma once
#include <cstdint>

namespace convext {

// X(name): the terms. A multiplication, an address or an output is a vector's, whatever share of its lanes is used.
//
//   call     1: what a launch takes besides
//   product  multiplications and additions of a vector
//   reload   those of them that load an operand which their neighbours load, too
//   tap      addresses of pixels: one for each tap of each output, for each panel of columns
//   gather   elements or vectors that are put in another order before they are multiplied
//   scatter  those that are put back
//   output   vectors that are finished and stored
//   row      vectors of sums that are begun anew for each row of outputs
//   operand  elements of activations that are read as they lie
//   weight   elements of weights that are read, and packed where they are new at every call
//   copy     elements of activations whose memory order is changed
//   convert  elements of activations whose type is changed
#define CONVEXT_WORK(X) \
  X(call) X(product) X(reload) X(tap) X(gather) X(scatter) X(output) X(row) X(operand) X(weight) X(copy) X(convert)

enum class Term : int32_t {
#define CONVEXT_X(name) name,
  CONVEXT_WORK(CONVEXT_X)
#undef CONVEXT_X
};

#define CONVEXT_X(name) +1
constexpr int kTerms = 0 CONVEXT_WORK(CONVEXT_X);
#undef CONVEXT_X

// A number for each term.
struct Work {
  double of[kTerms] = {};

  double& operator[](Term term) { return of[static_cast<int>(term)]; }
  double operator[](Term term) const { return of[static_cast<int>(term)]; }
};

}  // namespace convext

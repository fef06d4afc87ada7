// The convolutions of this library as functions of plain data, for convext/_call (csrc/call/call.cpp), which has
// tensors of torch's at hand and needs neither dispatcher nor boxed arguments.
#pragma once
#include "core/api.h"
#include "view.h"

namespace convext {

// Each function returns nullptr, or what is wrong, in words that hold until the thread's next call. `result`: a new
// AtenTensorHandle. `bias`: one that stays the caller's, or nullptr. `variant`, `packed`, `version` and `channels_last`
// are those of the operators in torch/ops_conv.cpp, and so is what is checked.
struct DirectCalls {
  const char* (*fprop)(int64_t variant, const View& x, const View& w, int64_t packed, int64_t version, void* bias,
                       const Geom& geom, bool channels_last, void** result);
  const char* (*dgrad)(int64_t variant, const View& dy, const View& w, int64_t packed, int64_t version, int64_t height,
                       int64_t width, const Geom& geom, bool channels_last, void** result);
  const char* (*wgrad)(int64_t variant, const View& dy, const View& x, int64_t r, int64_t s, const Geom& geom,
                       bool channels_last, void** result);
};

CONVEXT_API const DirectCalls& direct_calls();  // in torch/ops_conv.cpp

}  // namespace convext

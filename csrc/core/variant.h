// What a kernel says about itself to the rest of convext. No torch here: raw pointers and plain data.
//
// A variant is one kernel for one pass, one dtype and one instruction set. It says in words which problems it rejects,
// how much scratch memory it wants, how it likes its weights packed, what it does or costs beside the others, and it launches.
// What was measured to be slower than ATen is its backend's business.
#pragma once
#include "conv_problem.h"
#include "epilogue.h"
#include "work.h"

namespace convext {

// Instruction sets, each implying the ones before it on its device.
enum class Isa : int32_t { kPortable = 0, kAVX2 = 1, kAVX512 = 2, kAVX512BF16 = 3, kSM80 = 10, kSM90 = 11 };

// X(name): the algorithms, as Python and reports name them.
#define CONVEXT_ALGORITHMS(X) \
  X(direct) X(dilated) X(winograd) X(stem) X(pointwise) X(grouped) X(depthwise) X(layer_norm) X(mean)
enum class Algorithm : int32_t {
#define CONVEXT_X(name) name,
  CONVEXT_ALGORITHMS(CONVEXT_X)
#undef CONVEXT_X
};

// X(name): what products are formed in. Sums are in the accumulate dtype.
#define CONVEXT_ARITHMETICS(X) X(float32) X(float64) X(bfloat16) X(float16) X(tf32)
enum class Arithmetic : int32_t {
#define CONVEXT_X(name) name,
  CONVEXT_ARITHMETICS(CONVEXT_X)
#undef CONVEXT_X
};

// The accuracy setting (docs/design.md), and of a kernel the strictest one that allows it: everything; what errs no
// more than a plain sum; plain sums.
enum class Accuracy : int32_t { kFast = 0, kStrict = 1, kDirect = 2 };

// Bytes; of every CPU that there are kernels for.
constexpr int64_t kCacheLine = 64;

// A body that works on the half-open range [begin, end).
using RangeBody = void (*)(void* context, int64_t begin, int64_t end);

// How CPU kernels use threads: torch's own pool, handed in so that kernels see no torch header. The split of the work
// into chunks must depend on the problem alone, so that results do not depend on the number of threads.
struct Parallel {
  void (*run)(int64_t begin, int64_t end, int64_t grain, RangeBody body, void* context);
  int32_t threads;

  // for_each(count, f): f(i) for every i in [0, count), in any order, on any thread.
  template <class F>
  void for_each(int64_t count, F&& f) const {
    if (count <= 0) return;
    if (threads <= 1 || count == 1) {
      for (int64_t i = 0; i < count; ++i) f(i);
      return;
    }
    run(0, count, 1, [](void* context, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) (*static_cast<F*>(context))(i);
    }, const_cast<void*>(static_cast<const void*>(&f)));
  }
};

// The weights of an fprop or dgrad problem before they were packed, for a kernel that may have to go back to them.
struct WeightSource {
  const void* (*get)(const void* context, const Parallel&, void* room) = nullptr;
  const void* context = nullptr;

  // As dense KCRS in the variant's dtype: where they lie, or copied into `room`, which is for w_size() elements.
  const void* dense(const Parallel& parallel, void* room) const { return get(context, parallel, room); }
};

// The operands of one launch. Activations are dense in the layout that the problem names, unless the variant's
// `layouts` says that it takes NHWC alone, in which case the caller has converted them.
//
//   pass   a    b                     out
//   fprop  x    packed w (or w KCRS)  y
//   dgrad  dy   packed w (or w KCRS)  dx
//   wgrad  dy   x                     dw, KCRS
struct LaunchArgs {
  const void* a;
  const void* b;
  void* out;
  Epilogue epilogue;         // of fprop, and on the CPU of dgrad, for a transposed convolution
  void* workspace;           // workspace(problem) bytes, 64-byte aligned, not cleared
  const Parallel* parallel;  // CPU
  void* stream;              // CUDA: cudaStream_t

  // A wgrad variant with `wgrad_writes_dx` computes dx in the same pass over x and dy where dx is not null.
  const void* w = nullptr;
  void* dx = nullptr;

  // An fprop variant with `stats_rows` writes partial batch statistics of y, as stored, where stats is not null: for
  // each row, which is some of the pixels, mean and sum of squared deviations by channel, (rows, K, 2), then the number
  // of pixels of each row, all in the accumulate dtype.
  void* stats = nullptr;

  // What `b` was packed from: fprop and dgrad by Winograd's filtering need it.
  WeightSource weights{};
};

// The memory orders that a kernel takes: kAnyX leaves the choice for x (dx), not for y (dy).
enum class Layouts : int32_t { kNHWCOnly = 0, kAny = 1, kAnyX = 2 };

struct Variant {
  const char* name;  // <pass>_<algorithm>_<dtype>_<isa>: for people; whoever decides reads the facts below
  Algorithm algorithm;
  Device device;
  Pass pass;
  DType dtype;  // of the activations in memory
  Arithmetic arithmetic;
  Isa isa;
  Layouts layouts;

  // Why this kernel cannot serve the problem, in words for a user, or nullptr. Device, pass, dtype and instruction set
  // have been matched before.
  const char* (*reject)(const ConvProblem&);

  // Scratch memory in bytes; may be nullptr for none. May depend on the number of threads.
  int64_t (*workspace)(const ConvProblem&, int32_t threads);

  // Packed weights: nullptr where the kernel reads KCRS as it is. `pack_format` names the packed order: two problems
  // with the same weight, format, C, K, T, R, S and groups share one copy (packed_weight.h), so what else the order
  // follows from belongs into the name; `packed_size` is in bytes; `pack` reads w as dense KCRS.
  const char* (*pack_format)(const ConvProblem&);
  int64_t (*packed_size)(const ConvProblem&);
  void (*pack)(const ConvProblem&, const void* w, void* packed, const Parallel&);

  // What a launch costs beside the other variants of the device, in units of its own: lower is better. On the CPU it is
  // nullptr, and `work` below says what a launch does.
  double (*cost)(const Variant&, const ConvProblem&);

  // Runs the kernel. Returns nullptr, or what went wrong in words.
  const char* (*launch)(const ConvProblem&, const LaunchArgs&);

  bool takes_nchw_x() const { return layouts != Layouts::kNHWCOnly; }
  bool takes_nchw_y() const { return layouts == Layouts::kAny; }

  // Whether activations of the problem are copied, to the kernel's dtype and back.
  bool is_staged(const ConvProblem& problem) const { return dtype != problem.dtype; }

  Accuracy strictest = Accuracy::kDirect;
  int32_t tile = 0;                                     // outputs along an axis of Winograd's tile
  bool volumes = false;                                 // takes problems of three axes, D > 1 or T > 1
  bool gathers = false;                                 // reads operands element by element, where others read vectors
  bool wgrad_writes_dx = false;                         // see LaunchArgs
  int64_t (*stats_rows)(const ConvProblem&) = nullptr;  // see LaunchArgs
  int32_t block_m = 0, block_n = 0, block_k = 0;        // the tile of a matrix-product kernel on CUDA
  void (*work)(const Variant&, const ConvProblem&, Work&) = nullptr;  // of a CPU kernel: adds its counts
};

}  // namespace convext

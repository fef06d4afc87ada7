// The input under a block of outputs of a layer with few channels (a stem), copied so that the outputs of a row are a
// constant distance apart, padding included:
//
//   planes   patch[i][c][f][j] = x[n, c, h, w]    w = (q0 + j) * stride_w - pad_w + f     NCHW on either side
//   pixels   patch[i][j][c]    = x[n, c, h, w]    w = q0 * stride_w - pad_w + j           x and y NHWC
//   with h = p0 * stride_h - pad_h + i
//
// In planes, tap (r, s) of output (p, q) is element j = q - q0 + s * dil_w / stride_w of phase f = s * dil_w % stride_w
// in row i = (p - p0) * stride_h + r * dil_h, so neighbouring outputs read neighbouring elements whatever the stride:
//
//   stride 2:   x   | 0 | a b c d e f g h | 0 |       f = 0:  0 b d f h      taps s = 0, 2, ...
//                                                     f = 1:  a c e g 0      taps s = 1, 3, ...
//
// Columns outside the image are zeros; rows outside it are left as they are, for fprop
// computes no tap that reads them.
// A patch is at most 48 KiB: the first-level cache holds the rows that one row of outputs reads and the weights of two
// vectors of filters. Planes take a shuffle less than the stride for a vector of elements, pixels are copied.
#pragma once
#include "cpu/kernels/family.h"
#include "cpu/kernels/gemm/cut.h"
#include "cpu/simd/vec.h"

namespace convext::CONVEXT_ISA {

constexpr int32_t kStemChannels = 8;  // more input channels are not few
constexpr int32_t kStemTaps = 2048;   // R * S * C
constexpr int32_t kPatchElements = 12288;
constexpr int32_t kPatchSlack = 64;   // a vector may be read past the end
constexpr int32_t kStemColumns = 32;  // outputs side by side that a patch must hold at least
constexpr int32_t kStemBlocks = 32;   // blocks of rows to aim for, so that every thread finds something to do

// A block of outputs: (n, [p0, p0 + rows), [q0, q0 + columns)).
struct StemOutputs {
  int64_t n;
  int32_t p0, rows, q0, columns;
};

struct StemBlocks {
  int32_t reach;          // columns past the first that a row of taps spans, in units of the stride
  int32_t rows, columns;  // outputs of a block
  int32_t pitch;          // elements of a phase

  explicit StemBlocks(const ConvProblem& p)
      : reach(static_cast<int32_t>(int64_t{p.s - 1} * p.dil_w / p.stride_w)), rows(1), columns(p.q()) {
    if (!fits(p)) {
      const int64_t most = kPatchElements / (lines(p) * p.c * p.stride_w) - reach;
      columns = static_cast<int32_t>(most > 0 ? most : 0);
    }
    const int64_t worth = int64_t{p.n} * p.p() / kStemBlocks + 1;
    while (rows < worth && rows < p.p()) {
      ++rows;
      if (!fits(p)) {
        --rows;
        break;
      }
    }
    pitch = columns + reach;
  }

  int64_t lines(const ConvProblem& p) const { return int64_t{rows - 1} * p.stride_h + int64_t{p.r - 1} * p.dil_h + 1; }
  bool fits(const ConvProblem& p) const {
    return lines(p) * p.c * p.stride_w * (int64_t{columns} + reach) <= kPatchElements;
  }

  int64_t down(const ConvProblem& p) const { return (p.p() + rows - 1) / rows; }
  int64_t across(const ConvProblem& p) const { return (p.q() + columns - 1) / columns; }
  int64_t count(const ConvProblem& p) const { return p.n * down(p) * across(p); }
  StemOutputs at(const ConvProblem& p, int64_t block) const {
    const int64_t column = block % across(p), row = block / across(p) % down(p);
    const auto part = [](int64_t size, int64_t i, int64_t n) { return static_cast<int32_t>(size * i / n); };
    const int32_t p0 = part(p.p(), row, down(p)), q0 = part(p.q(), column, across(p));
    return {block / across(p) / down(p), p0, part(p.p(), row + 1, down(p)) - p0, q0,
            part(p.q(), column + 1, across(p)) - q0};
  }
};

inline void stem_work(const Variant& v, const ConvProblem& p, Work& work) {
  const double vectors = vectors_of(p.k, v), pixels = static_cast<double>(p.npq()), rows = double{1} * p.n * p.p();
  const double taps = static_cast<double>(p.taps()) * p.c;
  work[Term::product] += pixels * taps * vectors;
  work[Term::gather] += static_cast<double>(p.x_size());  // into patches
  work[Term::weight] += static_cast<double>(p.w_size());
  if (v.pass == Pass::kWgrad) {
    work[Term::row] += rows * taps * vectors;
    work[Term::operand] += static_cast<double>(p.y_size());
  } else {
    work[Term::row] += rows * p.taps() * vectors;
    work[Term::output] += pixels * vectors;
  }
}

inline const char* reject_unless_stem(const ConvProblem& p) {
  if (p.groups != 1) return "the channels are in groups";
  if (p.c > kStemChannels) return "it has more than 8 input channels";
  if (int64_t{p.r} * p.s * p.c > kStemTaps) return "its filter has too many taps";
  if (p.p() <= 0 || p.q() <= 0 || p.c == 0) return nullptr;
  const StemBlocks blocks(p);
  return blocks.columns >= (p.q() < kStemColumns ? p.q() : kStemColumns)
             ? nullptr
             : "the input under a row of its outputs does not fit into the first-level cache";
}

// ---- Filling ----

// out[j] = in[j * step]: every step-th element, by shuffles of `step` vectors where the instruction set has them.
// Reads nothing past in[(count - 1) * step].
class EveryStep {
 public:
  using V = Vec<float>;

  explicit EveryStep(int32_t step) : step_(step) {
    if (!shuffles()) return;
    for (int k = 1; k < step; ++k) {
      for (int lane = 0; lane < V::width; ++lane) {
        const int at = lane * step, from = at / V::width;
        index_[k][lane] = from == k ? V::width + at % V::width : k == 1 ? at % V::width : lane;
      }
    }
  }

  void operator()(float* out, const float* in, int64_t count) const {
    switch (shuffles() ? step_ : 0) {
      case 0:
        for (int64_t j = 0; j < count; ++j) out[j] = in[j * step_];
        return;
      case 1: return run<1>(out, in, count);
      case 2: return run<2>(out, in, count);
      case 3: return run<3>(out, in, count);
      case 4: return run<4>(out, in, count);
      default: return run<0>(out, in, count);
    }
  }

 private:
  static constexpr int kMaxStep = 12;
  bool shuffles() const {
#if defined(__clang__) || !(defined(__AVX512F__) || defined(__AVX2__))
    return step_ == 1;
#else
    return step_ <= kMaxStep;
#endif
  }
  V merge(V a, V b, int k) const {
#if defined(__clang__)
    return a;  // not called: shuffles() is false but for step 1
#else
    return __builtin_shuffle(a.v, b.v, index_[k]);
#endif
  }

  template <int STEP>  // 0: any
  CONVEXT_INLINE void run(float* out, const float* in, int64_t count) const {
    const int step = STEP ? STEP : step_;
    int64_t j = 0;
    for (; j + V::width < count; j += V::width) {
      const float* from = in + j * step;
      V all = load(from);
      CONVEXT_UNROLL
      for (int k = 1; k < step; ++k) all = merge(all, load(from + k * V::width), k);
      store(out + j, all);
    }
    const float* from = in + j * step;
    int64_t left = (count - 1 - j) * step + 1;
    V all = load(from, Lanes<float>(left));
    CONVEXT_UNROLL
    for (int k = 1; k < step; ++k) {
      left = left > V::width ? left - V::width : 0;
      all = merge(all, load(from + k * V::width, Lanes<float>(left)), k);
    }
    store(out + j, all, Lanes<float>(count - j));
  }

  int32_t step_;
  Native<float>::bits index_[kMaxStep];
};

// Columns first, first + step, ... of a line of the image, `length` of them, zeros outside [0, width).
struct Line {
  int32_t begin, end, length;  // elements inside the image: [begin, end)
  int64_t first_inside;        // column of element `begin`

  Line(int32_t first, int32_t step, int32_t count, int32_t width) : length(count) {
    const int32_t before = first < 0 ? (-first + step - 1) / step : 0;
    const int32_t inside = first < width ? (width - 1 - first) / step + 1 : 0;
    begin = before < length ? before : length;
    end = inside < begin ? begin : inside < length ? inside : length;
    first_inside = first + int64_t{begin} * step;
  }

  // `adjacent` elements for each column, columns `pixel` elements of the image apart.
  void copy(float* to, const float* line, int64_t pixel, int32_t adjacent, const EveryStep& every_step) const {
    for (int32_t j = 0; j < begin * adjacent; ++j) to[j] = 0;
    if (end > begin) every_step(to + begin * adjacent, line + first_inside * pixel, int64_t{end - begin} * adjacent);
    for (int32_t j = end * adjacent; j < length * adjacent; ++j) to[j] = 0;
  }
};

// What all patches of a launch share: how x is read and where a tap's elements are.
class StemPatches {
 public:
  StemPatches(const ConvProblem& p, const void* x)
      : p_(p),
        blocks_(p),
        x_(static_cast<const float*>(x)),
        pixels_(p.x_layout == Layout::kNHWC && p.y_layout == Layout::kNHWC),
        line_(p.c * p.stride_w * blocks_.pitch),
        pixel_(p.x_layout == Layout::kNHWC ? p.c : 1),
        row_(int64_t{p.w} * pixel_),
        channel_(p.x_layout == Layout::kNHWC ? 1 : int64_t{p.h} * p.w),
        every_step_(pixels_ ? 1 : p.stride_w * static_cast<int32_t>(pixel_)) {}

  const StemBlocks& blocks() const { return blocks_; }

  // Elements from an output to the next of its row, and to the same column of the next row.
  int32_t column_pitch() const { return pixels_ ? p_.stride_w * p_.c : 1; }
  int32_t row_pitch() const { return p_.stride_h * line_; }

  // The offsets of all taps in the order r, s, c, which is that of packed weights: kStemTaps elements.
  void offsets(int32_t* to) const {
    for (int32_t r = 0; r < p_.r; ++r) {
      for (int32_t s = 0; s < p_.s; ++s) {
        for (int32_t c = 0; c < p_.c; ++c) *to++ = offset(r, s, c);
      }
    }
  }

  // The patch of a block of outputs: kPatchElements + kPatchSlack elements.
  void fill(const StemOutputs& block, float* patch) const {
    const int32_t first_h = p_.h_of(block.p0, 0), last_h = p_.h_of(block.p0 + block.rows - 1, p_.r - 1);
    const int32_t begin = first_h < 0 ? 0 : first_h, end = last_h < p_.h ? last_h + 1 : p_.h;
    const int32_t w = p_.w_of(block.q0, 0), columns = block.columns;
    const float* image = x_ + block.n * p_.c * p_.h * p_.w;
    if (pixels_) {
      const Line line(w, 1, (columns - 1) * p_.stride_w + (p_.s - 1) * p_.dil_w + 1, p_.w);
      for (int32_t h = begin; h < end; ++h) {
        line.copy(patch + int64_t{h - first_h} * line_, image + h * row_, pixel_, p_.c, every_step_);
      }
      return;
    }
    for (int32_t f = 0; f < p_.stride_w; ++f) {
      const Line line(w + f, p_.stride_w, columns + blocks_.reach, p_.w);
      for (int32_t h = begin; h < end; ++h) {
        float* to = patch + int64_t{h - first_h} * line_ + f * blocks_.pitch;
        const float* from = image + h * row_;
        for (int32_t c = 0; c < p_.c; ++c, to += p_.stride_w * blocks_.pitch, from += channel_) {
          line.copy(to, from, pixel_, 1, every_step_);
        }
      }
    }
  }

  // The patch's rows outside the image, which fill() leaves as they are.
  void clear_outside(const StemOutputs& block, float* patch) const {
    const int32_t first_h = p_.h_of(block.p0, 0), last_h = p_.h_of(block.p0 + block.rows - 1, p_.r - 1);
    for (int32_t h = first_h; h <= last_h; ++h) {
      float* row = patch + int64_t{h - first_h} * line_;
      if (h >= 0 && h < p_.h) continue;
      for (int32_t j = 0; j < line_; ++j) row[j] = 0;
    }
  }

 private:
  // Element of tap (r, s), channel c, for the block's first output.
  int32_t offset(int32_t r, int32_t s, int32_t c) const {
    const int32_t shift = s * p_.dil_w, line = r * p_.dil_h * line_;
    if (pixels_) return line + shift * p_.c + c;
    return line + (c * p_.stride_w + shift % p_.stride_w) * blocks_.pitch + shift / p_.stride_w;
  }

  const ConvProblem& p_;
  const StemBlocks blocks_;
  const float* x_;
  const bool pixels_;                    // and not planes
  const int32_t line_;                   // elements of a line in the patch
  const int64_t pixel_, row_, channel_;  // of x, in elements
  const EveryStep every_step_;
};

// The filter rows of output row p that lie inside the image: [begin, end).
struct FilterRows {
  int32_t begin = 0, end;
  FilterRows(const ConvProblem& problem, int32_t p) : end(problem.r) {
    while (begin < end && problem.h_of(p, begin) < 0) ++begin;
    while (end > begin && problem.h_of(p, end - 1) >= problem.h) --end;
  }
};

}  // namespace convext::CONVEXT_ISA

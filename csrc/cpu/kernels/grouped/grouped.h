// Groups of few channels: a vector of filters spans several groups, and each lane wants the channels of its own.
//
//   x of a pixel   a0 a1 a2 a3 | b0 b1 b2 b3 | ...    groups a, b, ... of 4 channels
//   spread, c = 1  a1 a1 a1 a1 | b1 b1 b1 b1 | ...    what filters of groups a, b, ... multiply by their weight for c
//
// Spreading is a shuffle. Each spread vector meets R * S taps, so the lines of the image that a row of outputs reads
// are spread once into a ring of lines in the first-level cache and multiplied from there:
//
//   ring[h % lines][c][f][j]   a vector: pixel w = (q0 + j) * stride_w - pad_w + f, as in stem_patch.h
#pragma once
#include "cpu/kernels/stem/stem_patch.h"

namespace convext::CONVEXT_ISA {

constexpr int32_t kGroupedTaps = 1024;  // R * S * channels of a group
constexpr int32_t kRingVectors = 9216 / Vec<float>::width;
constexpr int32_t kGroupedColumns = 14;  // outputs side by side that a ring must hold at least
constexpr int64_t kGroupedItems = 32;    // items of work to aim for

struct GroupedBlocks {
  int32_t lines, reach, columns, pitch;
  int32_t vectors;               // of filters
  int64_t down = 0, across = 0;  // blocks of rows, of columns

  explicit GroupedBlocks(const ConvProblem& p)
      : lines((p.r - 1) * p.dil_h + 1),
        reach(static_cast<int32_t>(int64_t{p.s - 1} * p.dil_w / p.stride_w)),
        vectors((p.k + Vec<float>::width - 1) / Vec<float>::width) {
    const int64_t most = kRingVectors / (int64_t{lines} * p.c_per_group() * p.stride_w) - reach;
    columns = static_cast<int32_t>(most < 0 ? 0 : most < p.q() ? most : p.q());
    pitch = columns + reach;
    if (columns == 0) return;
    across = (p.q() + columns - 1) / columns;
    // Every block of rows spreads lines that its neighbour spreads too: no more of them than threads may want.
    const int64_t others = int64_t{p.n} * vectors * across, wanted = (kGroupedItems + others - 1) / others;
    const int64_t most_down = p.p() / (2 * lines) + 1;
    down = wanted < most_down ? wanted : most_down;
  }
  int64_t line() const { return int64_t{pitch} * Vec<float>::width; }  // elements of one phase of one channel
};

inline void grouped_work(const Variant& v, const ConvProblem& p, Work& work) {
  const double vectors = vectors_of(p.k, v), taps = static_cast<double>(p.taps()) * p.c_per_group();
  work[Term::product] += static_cast<double>(p.npq()) * taps * vectors;
  work[Term::gather] += static_cast<double>(p.nhw()) * p.c_per_group() * vectors;  // spread
  work[Term::output] += static_cast<double>(p.npq()) * vectors;
  work[Term::row] += static_cast<double>(p.n) * p.p() * taps * vectors;
  work[Term::weight] += static_cast<double>(p.w_size());
}

inline const char* reject_unless_grouped(const ConvProblem& p) {
  if (p.groups == 1 || p.is_depthwise()) return "the channels are not in groups of several";
  if (p.k_per_group() == 0 || p.c_per_group() == 0 || p.p() <= 0 || p.q() <= 0) return "there is nothing to multiply";
  if (p.k_per_group() >= Vec<float>::width) return "a group's filters fill a vector";
  if (Vec<float>::width % p.k_per_group() != 0) return "a vector of filters does not hold whole groups";
  if (p.c_per_group() > p.k_per_group()) return "a vector of filters needs more than a vector of channels";
  if (int64_t{p.r} * p.s * p.c_per_group() > kGroupedTaps) return "its filter has too many taps";
  return GroupedBlocks(p).columns >= (p.q() < kGroupedColumns ? p.q() : kGroupedColumns)
             ? nullptr
             : "the input under a row of its outputs does not fit into the first-level cache";
}

// A block of outputs: filters of one vector, rows [p0, p1), columns [q0, q1) of image n.
struct GroupedOutputs {
  int64_t n;
  int32_t vector, p0, p1, q0, q1;

  GroupedOutputs(const ConvProblem& p, const GroupedBlocks& blocks, int64_t item) {
    vector = static_cast<int32_t>(item % blocks.vectors);
    const int64_t column = item / blocks.vectors % blocks.across;
    const int64_t row = item / blocks.vectors / blocks.across % blocks.down;
    n = item / blocks.vectors / blocks.across / blocks.down;
    p0 = static_cast<int32_t>(p.p() * row / blocks.down);
    p1 = static_cast<int32_t>(p.p() * (row + 1) / blocks.down);
    q0 = static_cast<int32_t>(p.q() * column / blocks.across);
    q1 = static_cast<int32_t>(p.q() * (column + 1) / blocks.across);
  }
};

class SpreadLines {
 public:
  using V = Vec<float>;

  SpreadLines(const ConvProblem& p, const GroupedBlocks& blocks, const float* x, const GroupedOutputs& block)
      : p_(p),
        blocks_(blocks),
        x_(x + block.n * p.h * p.w * p.c),
        block_(block),
        first_channel_(block.vector * V::width / p.k_per_group() * p.c_per_group()),
        channels_(p.c - first_channel_),
        next_(p.h_of(block.p0, 0)) {
    for (int32_t c = 0; c < p.c_per_group(); ++c) {
      for (int lane = 0; lane < V::width; ++lane) {
        index_[c][lane] = lane / p.k_per_group() * p.c_per_group() + c;
      }
    }
    int32_t t = 0;
    for (int32_t s = 0; s < p.s; ++s) {
      const int32_t shift = s * p.dil_w;
      for (int32_t c = 0; c < p.c_per_group(); ++c) {
        offset_[t++] =
            static_cast<int32_t>((c * p.stride_w + shift % p.stride_w) * blocks.line()) + shift / p.stride_w * V::width;
      }
    }
  }

  // Spreads the lines that output row p reads and no row before it has.
  void advance(int32_t p) {
    const int32_t first = p_.h_of(p, 0), last = p_.h_of(p, p_.r - 1);
    for (int32_t h = next_ > first ? next_ : first; h <= last; ++h) {
      if (h >= 0 && h < p_.h) spread(h);
    }
    next_ = last + 1;
  }

  // Where filter row r of output row p begins, or nullptr where it meets padding alone.
  const float* row(int32_t p, int32_t r) const {
    const int32_t h = p_.h_of(p, r);
    return h < 0 || h >= p_.h ? nullptr : ring_ + slot(h);
  }
  // Of taps (s, c) in that order, in elements; outputs of a row are a vector apart.
  const int32_t* offset() const { return offset_; }

 private:
  int64_t slot(int32_t h) const { return h % blocks_.lines * blocks_.line() * p_.c_per_group() * p_.stride_w; }

  using Bits = Native<float>::bits;
  static constexpr int kChannels = V::width > 8 ? V::width : 8;  // more than a group has

  static CONVEXT_INLINE V shuffled(V x, Bits index) {
#if defined(__clang__)
    V all;
    for (int lane = 0; lane < V::width; ++lane) all.v[lane] = x.v[index[lane]];
    return all;
#else
    return __builtin_shuffle(x.v, index);
#endif
  }

  void spread(int32_t h) {
    switch (p_.c_per_group()) {
      case 2: return spread_line<2>(h);
      case 4: return spread_line<4>(h);
      case 8: return spread_line<8>(h);
      default: return spread_line<0>(h);
    }
  }

  template <int CHANNELS>  // of a group; 0: any
  void spread_line(int32_t h) {
    const int32_t channels = CHANNELS ? CHANNELS : p_.c_per_group(), length = block_.q1 - block_.q0 + blocks_.reach;
    const int64_t channel_pitch = p_.stride_w * blocks_.line(), step = int64_t{p_.stride_w} * p_.c;
    const bool whole = channels_ >= V::width;
    const Lanes<float> lanes(channels_);
    Bits index[kChannels] = {};
    CONVEXT_UNROLL
    for (int32_t c = 0; c < channels; ++c) index[c] = index_[c];
    for (int32_t f = 0; f < p_.stride_w; ++f) {
      const int32_t first = p_.w_of(block_.q0, 0) + f;
      float* to = ring_ + slot(h) + f * blocks_.line();
      const float* from = x_ + (int64_t{h} * p_.w + first) * p_.c + first_channel_;
      for (int32_t j = 0, w = first; j < length; ++j, w += p_.stride_w, from += step, to += V::width) {
        V x = V::zero();
        if (w >= 0 && w < p_.w) x = whole ? load(from) : load(from, lanes);
        CONVEXT_UNROLL
        for (int32_t c = 0; c < channels; ++c) store(to + c * channel_pitch, shuffled(x, index[c]));
      }
    }
  }

  const ConvProblem& p_;
  const GroupedBlocks& blocks_;
  const float* x_;
  const GroupedOutputs& block_;
  const int32_t first_channel_, channels_;
  int32_t next_;  // the first line that has not been spread
  Bits index_[kChannels];
  int32_t offset_[kGroupedTaps];
  alignas(64) float ring_[kRingVectors * Vec<float>::width];
};

}  // namespace convext::CONVEXT_ISA

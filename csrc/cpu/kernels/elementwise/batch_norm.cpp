// Batch norm, activation and residual (batch_norm.h): bound by memory, so what counts is the number of passes over it.
//
//   batch_stats       1 pass: reads y
//   bn_act            1 pass: reads y, residual; writes out
//   bn_act_backward   frozen:   1 pass, sums and results together
//                     training: 2 passes; z and dz are computed again in the second, which costs less than storing
//                               them, except for silu and gelu, whose dz waits in dy
//   bn_act_and_sums   the first of these two, which writes out, too
//   bn_act_from_sums  the second
//
// Tile map. NHWC runs along memory, pixel by pixel, W channels at a time; per-channel constants and running sums lie in
// arrays that stay in L1. NCHW runs along each plane with the channel's constants in registers.
//
//   NHWC   c ->                        NCHW   hw ->
//   pixel  [ W | W | W | tail ]        n,c    [ W | W | W | tail ]
//     |    sums[c] += ...                     lane sums, added up in order at the end of a plane
//
// Sums: the pixels (NHWC) or images (NCHW) are cut into chunks by the shape alone, in NHWC whole images or parts of one,
// so that who computes image by image has whole chunks. A chunk is summed in the compute dtype, chunks are merged in
// double in their order: neither depends on the threads. Statistics are summed around the
// chunk's own first value, so that a mean far from zero cancels nothing, and merged by Chan's formula:
//
//   delta = mean_b - mean_a      mean = mean_a + delta * n_b / n      M2 = M2_a + M2_b + delta^2 * n_a * n_b / n
//
// (y - mean) * scale + beta is one subtraction more than y * scale + shift and keeps that accuracy; memory hides it.
#include "batch_norm.h"

#include "cpu/simd/half.h"

namespace convext {
namespace CONVEXT_ISA {
namespace {

constexpr int64_t kMaxChunks = 512;            // partial sums kept for a tensor
constexpr int64_t kChunkElements = 16 * 1024;  // a chunk or a task is at least this much work
constexpr int64_t kSerial = 32 * 1024;         // elements below which threads cost more than they bring

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// How the reduction over N and HW is cut: `rows` pixels in NHWC, images in NCHW, into `count` chunks, each of `images`
// images or, in NHWC, one of the `parts` of an image.
struct Chunks {
  int64_t rows, image_rows, images, parts = 1, count;

  explicit Chunks(const BatchNormArgs& args) {
    const bool nhwc = args.layout == Layout::kNHWC;
    image_rows = nhwc ? args.hw : 1;
    rows = args.n * image_rows;
    const int64_t elements = larger(1, nhwc ? args.hw * args.c : args.hw);  // of an image
    if (nhwc) parts = larger(1, smaller(smaller(elements / kChunkElements, args.hw), kMaxChunks / larger(1, args.n)));
    images = larger(ceil_div(kChunkElements, elements), ceil_div(args.n, kMaxChunks));
    if (parts > 1) images = 1;
    count = rows == 0 ? 0 : parts * ceil_div(args.n, images);
  }
  int64_t begin(int64_t chunk) const {
    return smaller(rows, chunk / parts * images * image_rows + chunk % parts * image_rows / parts);
  }
  int64_t end(int64_t chunk) const { return begin(chunk + 1); }
};

Parallel threads_for(const Parallel& parallel, const BatchNormArgs& args) {
  return {parallel.run, args.n * args.c * args.hw < kSerial ? 1 : parallel.threads};
}

constexpr int64_t kChannelBlock = 64;  // channels whose chunks are merged together: a line of each chunk at a time

// Calls body(begin, count) for every block of channels.
template <class Body>
void for_channel_blocks(const Parallel& parallel, int64_t c, const Body& body) {
  parallel.for_each(ceil_div(c, kChannelBlock), [&](int64_t block) {
    body(block * kChannelBlock, smaller(kChannelBlock, c - block * kChannelBlock));
  });
}

// ---- per-channel constants, and the partial sums behind them in the workspace ----

constexpr int kConstants = 5;  // arrays of C

template <class T>
struct Constants {
  T *mean, *scale, *shift;  // z = (y - mean) * scale + shift + residual
  T *mean_dz, *slope;       // dy = scale * (dz - mean_dz - (y - mean) * slope)
  T* partial;               // [chunk][2][c]
  double* sums;             // [2][c], of all chunks

  Constants(void* workspace, int64_t c) {
    sums = static_cast<double*>(workspace);
    mean = reinterpret_cast<T*>(sums + 2 * c);
    scale = mean + c;
    shift = scale + c;
    mean_dz = shift + c;
    slope = mean_dz + c;
    partial = slope + c;
  }
};

template <class T>
T inverse_std(const BatchNormArgs& args, int64_t c) {
  return args.var ? T(1) / static_cast<T>(__builtin_sqrt(static_cast<const T*>(args.var)[c] + args.eps)) : T(1);
}

template <class T>
double mean_rest(const BatchNormArgs& args, int64_t c) {
  return args.mean_rest ? static_cast<const T*>(args.mean_rest)[c] : 0;
}

// The rest of the mean goes where it costs nothing: (y - mean - rest) * scale + beta is (y - mean) * scale + shift.
template <class T>
void load_constants(const BatchNormArgs& args, const Constants<T>& constants) {
  auto channel = [](const void* values, int64_t c, T absent) {
    return values ? static_cast<const T*>(values)[c] : absent;
  };
  for (int64_t c = 0; c < args.c; ++c) {
    constants.mean[c] = channel(args.mean, c, T(0));
    constants.scale[c] = inverse_std<T>(args, c) * channel(args.gamma, c, T(1));
    constants.shift[c] =
        static_cast<T>(channel(args.beta, c, T(0)) - mean_rest<T>(args, c) * static_cast<double>(constants.scale[c]));
    constants.mean_dz[c] = constants.slope[c] = 0;  // until finish_sums
  }
}

// The constants of the channels that one vector works on: W neighbours in NHWC, one for all lanes in NCHW.
template <class T>
struct Channel {
  Vec<T> mean, scale, shift, mean_dz, slope;

  static CONVEXT_INLINE Channel neighbours(const Constants<T>& from, int64_t c, int64_t lanes) {
    return {load_as(from.mean + c, lanes), load_as(from.scale + c, lanes), load_as(from.shift + c, lanes),
            load_as(from.mean_dz + c, lanes), load_as(from.slope + c, lanes)};
  }
  static CONVEXT_INLINE Channel one(const Constants<T>& from, int64_t c) {
    return {Vec<T>(from.mean[c]), Vec<T>(from.scale[c]), Vec<T>(from.shift[c]), Vec<T>(from.mean_dz[c]),
            Vec<T>(from.slope[c])};
  }
};

// Calls body(offset, lanes) for every vector of [0, count); `lanes` is a constant W but for the tail.
template <class T, class Body>
CONVEXT_INLINE void for_vectors(int64_t count, Body&& body) {
  constexpr int64_t width = Vec<T>::width;
  int64_t i = 0;
  for (; i + width <= count; i += width) body(i, width);
  if (i < count) body(i, count - i);
}

// Calls body(pixel, count, channel, lanes) so that it visits the channels of `count` pixels at a time: what it loads
// for a channel serves all of them, and memory is still walked in its order, as that many streams.
template <class T, class Body>
CONVEXT_INLINE void for_pixels(int64_t begin, int64_t end, int64_t c, Body&& body) {
  constexpr int64_t kPixels = 4;
  int64_t pixel = begin;
  for (; pixel + kPixels <= end; pixel += kPixels) {
    for_vectors<T>(c, [&](int64_t i, int64_t lanes) CONVEXT_LAMBDA_INLINE { body(pixel, kPixels, i, lanes); });
  }
  for (; pixel < end; ++pixel) {
    for_vectors<T>(c, [&](int64_t i, int64_t lanes) CONVEXT_LAMBDA_INLINE { body(pixel, 1, i, lanes); });
  }
}

// The sum of the first `lanes` lanes, in order.
template <class T>
CONVEXT_INLINE double sum_lanes(Vec<T> a, int64_t lanes = Vec<T>::width) {
  double sum = 0;
  for (int64_t i = 0; i < lanes; ++i) sum += a.v[i];
  return sum;
}

// ---- statistics ----

template <class S>
void chunk_stats_nhwc(const S* y, int64_t pixels, int64_t c, compute_t<S>* sums) {
  using T = compute_t<S>;
  for (int64_t i = 0; i < 2 * c; ++i) sums[i] = 0;
  for_pixels<T>(0, pixels, c, [=](int64_t pixel, int64_t count, int64_t i, int64_t lanes) CONVEXT_LAMBDA_INLINE {
    const Vec<T> first = load_as(y + i, lanes);
    Vec<T> s1 = Vec<T>::zero(), s2 = Vec<T>::zero();
    for (int64_t x = 0; x < count; ++x) {
      const Vec<T> d = load_as(y + (pixel + x) * c + i, lanes) - first;
      s1 += d;
      s2 = fma(s2, d, d);
    }
    store_as(sums + i, load_as(sums + i, lanes) + s1, lanes);
    store_as(sums + c + i, load_as(sums + c + i, lanes) + s2, lanes);
  });
}

// One channel of images [begin, end). Planes are cut into pieces so that a lane never sums too much.
template <class S>
void chunk_stats_nchw(const S* y, int64_t images, int64_t image_stride, int64_t hw, double& sum, double& sum_squares) {
  using T = compute_t<S>;
  constexpr int64_t kPiece = 4096;
  const Vec<T> first(load_as(y, 1).v[0]);
  sum = sum_squares = 0;
  for (int64_t image = 0; image < images; ++image) {
    for (int64_t begin = 0; begin < hw; begin += kPiece) {
      const S* const piece = y + image * image_stride + begin;
      Vec<T> s1 = Vec<T>::zero(), s2 = Vec<T>::zero();
      for_vectors<T>(smaller(kPiece, hw - begin), [&](int64_t i, int64_t lanes) CONVEXT_LAMBDA_INLINE {
        const Vec<T> d = load_as(piece + i, lanes) - first;
        if (lanes == Vec<T>::width) {
          s1 += d;
          s2 = fma(s2, d, d);
        } else {
          sum += sum_lanes(d, lanes);
          sum_squares += sum_lanes(d * d, lanes);
        }
      });
      sum += sum_lanes(s1);
      sum_squares += sum_lanes(s2);
    }
  }
}

template <class S>
void stats_chunk(const BatchNormArgs& args, void* workspace, int64_t chunk) {
  const Chunks chunks(args);
  const int64_t begin = chunks.begin(chunk);
  chunk_stats_nhwc(static_cast<const S*>(args.y) + begin * args.c, chunks.end(chunk) - begin, args.c,
                   Constants<compute_t<S>>(workspace, args.c).partial + chunk * 2 * args.c);
}

// From the chunks' sums.
template <class S>
void finish_stats(const Parallel& parallel, const BatchNormArgs& args, double* mean, void* var, void* workspace) {
  using T = compute_t<S>;
  const Chunks chunks(args);
  const bool nhwc = args.layout == Layout::kNHWC;
  const S* const y = static_cast<const S*>(args.y);
  const T* const partial = Constants<T>(workspace, args.c).partial;
  const int64_t row = nhwc ? args.c : args.c * args.hw, channel = nhwc ? 1 : args.hw;  // elements of a step
  const int64_t row_elements = nhwc ? 1 : args.hw;                                     // of one channel
  for_channel_blocks(parallel, args.c, [&](int64_t begin, int64_t count) {
    // Means are merged relative to the channel's first value, where they are small.
    double origin[kChannelBlock], first[kChannelBlock], mean_a[kChannelBlock] = {}, m2_a[kChannelBlock] = {}, n_a = 0;
    const auto load_row = [&](int64_t index, double* out) {
      for (int64_t i = 0; i < count; ++i) out[i] = load_as(y + index * row + (begin + i) * channel, 1).v[0];
    };
    load_row(0, origin);
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
      const double n_b = static_cast<double>((chunks.end(chunk) - chunks.begin(chunk)) * row_elements), n = n_a + n_b;
      const double inverse = 1 / n_b, share = n_b / n, cross = n_a * n_b / n;
      const T *const sums = partial + chunk * 2 * args.c + begin, *const squares = sums + args.c;
      load_row(chunks.begin(chunk), first);
      for (int64_t i = 0; i < count; ++i) {
        const double sum = sums[i], m2_b = squares[i] - sum * sum * inverse;
        const double delta = (first[i] - origin[i]) + sum * inverse - mean_a[i];
        mean_a[i] += delta * share;
        m2_a[i] += (m2_b < 0 ? 0 : m2_b) + delta * delta * cross;
      }
      n_a = n;
    }
    for (int64_t i = 0; i < count; ++i) {
      double average = origin[i] + mean_a[i];
      if (!std::isfinite(average)) {  // a difference of infinities is NaN where their mean is infinite
        average = 0;
        for (int64_t index = 0; index < args.n * args.hw / row_elements; ++index) {
          const S* const from = y + index * row + (begin + i) * channel;
          for (int64_t j = 0; j < row_elements; ++j) average += load_as(from + j, 1).v[0];
        }
        average /= n_a;
      }
      mean[begin + i] = average;
      static_cast<T*>(var)[begin + i] = static_cast<T>(m2_a[i] / n_a);
    }
  });
}

template <class S>
void batch_stats(const Parallel& parallel, const BatchNormArgs& args, double* mean, void* var, void* workspace) {
  using T = compute_t<S>;
  const Chunks chunks(args);
  if (args.layout == Layout::kNHWC) {
    parallel.for_each(chunks.count, [&](int64_t chunk) { stats_chunk<S>(args, workspace, chunk); });
  } else {
    const S* const y = static_cast<const S*>(args.y);
    T* const partial = Constants<T>(workspace, args.c).partial;
    const int64_t row = args.c * args.hw, channel = args.hw;  // elements of a step
    parallel.for_each(chunks.count * args.c, [&](int64_t task) {
      const int64_t chunk = task / args.c, c = task % args.c, begin = chunks.begin(chunk);
      double sum, sum_squares;
      chunk_stats_nchw(y + begin * row + c * channel, chunks.end(chunk) - begin, row, args.hw, sum, sum_squares);
      partial[chunk * 2 * args.c + c] = static_cast<T>(sum);
      partial[chunk * 2 * args.c + args.c + c] = static_cast<T>(sum_squares);
    });
  }
  finish_stats<S>(parallel, args, mean, var, workspace);
}

// ---- element-wise passes ----

// Calls body(begin, end) with ranges of pixels (NHWC) or planes (NCHW) that are work enough for a thread.
template <class Body>
void for_ranges(const Parallel& parallel, const BatchNormArgs& args, Body&& body) {
  const bool nhwc = args.layout == Layout::kNHWC;
  const int64_t rows = nhwc ? args.n * args.hw : args.n * args.c, elements_a_row = nhwc ? args.c : args.hw;
  const int64_t size = ceil_div(kChunkElements, elements_a_row);
  parallel.for_each(ceil_div(rows, size), [&](int64_t i) { body(i * size, smaller(rows, (i + 1) * size)); });
}

// What bn_act does to a vector.
template <class S, class Act>
struct Forward {
  using T = compute_t<S>;
  const S *y, *residual;
  S* out;

  CONVEXT_INLINE void step(int64_t at, int64_t lanes, Vec<T> mean, Vec<T> scale, Vec<T> shift) const {
    Vec<T> z = fma(shift, load_as(y + at, lanes) - mean, scale);
    if (residual) z += load_as(residual + at, lanes);
    store_as(out + at, Act::forward(z), lanes);
  }

  void pixels(int64_t begin, int64_t end, int64_t channels, const Constants<T>& constants) const {
    // Copies, so that no store can alias what the loop reads.
    for_pixels<T>(begin, end, channels,
                  [=, self = *this](int64_t pixel, int64_t count, int64_t c, int64_t lanes) CONVEXT_LAMBDA_INLINE {
      const Vec<T> mean = load_as(constants.mean + c, lanes), scale = load_as(constants.scale + c, lanes);
      const Vec<T> shift = load_as(constants.shift + c, lanes);
      for (int64_t x = 0; x < count; ++x) self.step((pixel + x) * channels + c, lanes, mean, scale, shift);
    });
  }
};

template <class S, class Act>
void bn_act(const Parallel& parallel, const BatchNormArgs& args, void* out, void* workspace) {
  using T = compute_t<S>;
  const Constants<T> constants(workspace, args.c);
  load_constants(args, constants);
  const Forward<S, Act> pass{static_cast<const S*>(args.y), static_cast<const S*>(args.residual), static_cast<S*>(out)};
  const int64_t channels = args.c, hw = args.hw;
  if (args.layout == Layout::kNHWC) {
    for_ranges(parallel, args, [&](int64_t begin, int64_t end) { pass.pixels(begin, end, channels, constants); });
  } else {
    for_ranges(parallel, args, [&](int64_t begin, int64_t end) {
      for (int64_t plane = begin; plane < end; ++plane) {
        const int64_t c = plane % channels;
        const Vec<T> mean(constants.mean[c]), scale(constants.scale[c]), shift(constants.shift[c]);
        for_vectors<T>(hw, [=](int64_t i, int64_t lanes)
                               CONVEXT_LAMBDA_INLINE { pass.step(plane * hw + i, lanes, mean, scale, shift); });
      }
    });
  }
}

// ---- backward ----

// The value as if it had been stored and read again: nothing is contracted with the product that it is.
template <class T>
CONVEXT_INLINE Vec<T> rounded(Vec<T> a) {
#if defined(__AVX512F__)
  asm("" : "+v"(a.v));
#elif defined(__SSE2__)
  asm("" : "+x"(a.v));
#elif defined(__aarch64__)
  asm("" : "+w"(a.v));
#endif
  return a;
}

// What one pass over memory does.
enum class Work { kSums, kSumsKeepingDz, kResults, kResultsFromDz, kSumsAndResults };

// kWithOut: the passes that sum up write `out` as well.
template <class S, class Act, bool kWithOut = false>
struct Backward {
  using T = compute_t<S>;
  const S *y, *residual, *dout;
  S *dy, *dresidual;
  Work work;
  S* out = nullptr;

  bool sums_up() const { return work != Work::kResults && work != Work::kResultsFromDz; }

  CONVEXT_INLINE Vec<T> compute_dz(int64_t at, int64_t lanes, const Channel<T>& channel, Vec<T> centered) const {
    Vec<T> z = fma(channel.shift, centered, channel.scale);
    if (residual) z += load_as(residual + at, lanes);
    if constexpr (kWithOut) store_as(out + at, Act::forward(z), lanes);
    return load_as(dout + at, lanes) * Act::derivative(z);
  }

  // Returns dz, and dz * (y - mean) in `product`.
  CONVEXT_INLINE Vec<T> step(int64_t at, int64_t lanes, const Channel<T>& channel, Vec<T>& product) const {
    const Vec<T> centered = load_as(y + at, lanes) - channel.mean;
    Vec<T> dz;
    if (work == Work::kResultsFromDz) {
      dz = load_as(dy + at, lanes);
    } else {
      // The same whether it waits in memory for the second pass, is computed again, or in a piece.
      dz = rounded(compute_dz(at, lanes, channel, centered));
      if (dresidual && work != Work::kSums) store_as(dresidual + at, dz, lanes);
    }
    if (work == Work::kSumsKeepingDz) store_as(dy + at, dz, lanes);
    if (work == Work::kSumsAndResults) store_as(dy + at, channel.scale * dz, lanes);
    if (work == Work::kResults || work == Work::kResultsFromDz) {
      store_as(dy + at, channel.scale * (dz - channel.mean_dz - centered * channel.slope), lanes);
    }
    product = dz * centered;
    return dz;
  }

  void pixels(int64_t begin, int64_t end, int64_t c, const Constants<T>& constants, T* sums) const {
    if (sums_up()) {
      for (int64_t i = 0; i < 2 * c; ++i) sums[i] = 0;
    }
    // Copies, so that no store can alias what the loop reads.
    for_pixels<T>(begin, end, c,
                  [=, self = *this](int64_t pixel, int64_t count, int64_t i, int64_t lanes) CONVEXT_LAMBDA_INLINE {
      const Channel<T> channel = Channel<T>::neighbours(constants, i, lanes);
      Vec<T> s1 = Vec<T>::zero(), s2 = Vec<T>::zero(), product;
      for (int64_t x = 0; x < count; ++x) {
        s1 += self.step((pixel + x) * c + i, lanes, channel, product);
        s2 += product;
      }
      if (self.sums_up()) {
        store_as(sums + i, load_as(sums + i, lanes) + s1, lanes);
        store_as(sums + c + i, load_as(sums + c + i, lanes) + s2, lanes);
      }
    });
  }

  void plane(int64_t at, int64_t hw, const Channel<T>& channel, double& sum, double& sum_products) const {
    constexpr int64_t kPiece = 4096;
    const Backward self = *this;  // a copy that no store can alias
    for (int64_t begin = 0; begin < hw; begin += kPiece) {
      Vec<T> s1 = Vec<T>::zero(), s2 = Vec<T>::zero();
      for_vectors<T>(smaller(kPiece, hw - begin), [&](int64_t i, int64_t lanes) CONVEXT_LAMBDA_INLINE {
        Vec<T> product;
        const Vec<T> dz = self.step(at + begin + i, lanes, channel, product);
        if (lanes == Vec<T>::width) {
          s1 += dz;
          s2 += product;
        } else if (sums_up()) {
          sum += sum_lanes(dz, lanes);
          sum_products += sum_lanes(product, lanes);
        }
      });
      if (sums_up()) sum += sum_lanes(s1), sum_products += sum_lanes(s2);
    }
  }

  void run(const Parallel& parallel, const BatchNormArgs& args, const Constants<T>& constants) const {
    const Chunks chunks(args);
    if (args.layout == Layout::kNHWC) {
      parallel.for_each(chunks.count, [&](int64_t chunk) {
        pixels(chunks.begin(chunk), chunks.end(chunk), args.c, constants, constants.partial + chunk * 2 * args.c);
      });
      return;
    }
    parallel.for_each(chunks.count * args.c, [&](int64_t task) {
      const int64_t chunk = task / args.c, c = task % args.c;
      const Channel<T> channel = Channel<T>::one(constants, c);
      double sum = 0, sum_products = 0;
      for (int64_t n = chunks.begin(chunk); n < chunks.end(chunk); ++n) {
        plane((n * args.c + c) * args.hw, args.hw, channel, sum, sum_products);
      }
      if (sums_up()) {
        constants.partial[chunk * 2 * args.c + c] = static_cast<T>(sum);
        constants.partial[chunk * 2 * args.c + args.c + c] = static_cast<T>(sum_products);
      }
    });
  }
};

// Adds the chunks up in their order, into sums [2][c].
template <class T>
void add_chunks(const Parallel& parallel, const BatchNormArgs& args, const Constants<T>& constants, double* sums) {
  const int64_t chunks = Chunks(args).count;
  for_channel_blocks(parallel, args.c, [&](int64_t begin, int64_t count) {
    double *const sum = sums + begin, *const sum_products = sum + args.c;
    for (int64_t i = 0; i < count; ++i) sum[i] = sum_products[i] = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const T *const partial = constants.partial + chunk * 2 * args.c + begin, *const products = partial + args.c;
      for (int64_t i = 0; i < count; ++i) {
        sum[i] += partial[i];
        sum_products[i] += products[i];
      }
    }
  });
}

// From sums [2][c]: dbeta, dgamma, and what the second pass subtracts. Their products are with y - mean, without the
// mean's rest, and so are those of the second pass.
template <class T>
void finish_sums(const BatchNormArgs& args, const BatchNormGradients& gradients, const Constants<T>& constants,
                 const double* sums) {
  const double elements = static_cast<double>(args.n) * static_cast<double>(args.hw);
  const double* const sum_products = sums + args.c;
  for (int64_t c = 0; c < args.c; ++c) {
    const double inverse = inverse_std<T>(args, c), rest = mean_rest<T>(args, c);
    const double products = sum_products[c] - rest * sums[c], slope = products * inverse * inverse / elements;
    if (gradients.dbeta) static_cast<T*>(gradients.dbeta)[c] = static_cast<T>(sums[c]);
    if (gradients.dgamma) static_cast<T*>(gradients.dgamma)[c] = static_cast<T>(products * inverse);
    constants.mean_dz[c] = static_cast<T>(sums[c] / elements - rest * slope);
    constants.slope[c] = static_cast<T>(slope);
  }
}

// Whether dz is kept from the first pass to the second: a costly activation is differentiated once, where dy can hold
// dz unrounded.
template <class S, class Act>
constexpr bool kKeepsDz = Act::costly && sizeof(S) == sizeof(compute_t<S>);

template <class S, class Act>
void bn_act_backward(const Parallel& parallel, const BatchNormArgs& args, const BatchNormGradients& gradients,
                     void* workspace) {
  using T = compute_t<S>;
  const Constants<T> constants(workspace, args.c);
  load_constants(args, constants);
  Backward<S, Act> pass{static_cast<const S*>(args.y),         static_cast<const S*>(args.residual),
                        static_cast<const S*>(gradients.dout), static_cast<S*>(gradients.dy),
                        static_cast<S*>(gradients.dresidual),  Work::kSums};
  const bool through_stats = gradients.training && args.mean;
  constexpr bool keep = kKeepsDz<S, Act>;
  pass.work = !through_stats ? Work::kSumsAndResults : keep ? Work::kSumsKeepingDz : Work::kSums;
  pass.run(parallel, args, constants);
  add_chunks(parallel, args, constants, constants.sums);
  finish_sums(args, gradients, constants, constants.sums);
  if (!through_stats) return;
  pass.work = keep ? Work::kResultsFromDz : Work::kResults;
  pass.run(parallel, args, constants);
}

template <class S, class Act>
void bn_act_and_sums(const Parallel& parallel, const BatchNormArgs& args, const void* dout, void* out,
                     const BatchNormSums& found, void* workspace) {
  using T = compute_t<S>;
  const Constants<T> constants(workspace, args.c);
  load_constants(args, constants);
  const Backward<S, Act, true> pass{
      static_cast<const S*>(args.y), nullptr, static_cast<const S*>(dout),
      static_cast<S*>(found.dz),     nullptr, kKeepsDz<S, Act> ? Work::kSumsKeepingDz : Work::kSums,
      static_cast<S*>(out)};
  pass.run(parallel, args, constants);
  add_chunks(parallel, args, constants, found.sums);
}

template <class S, class Act>
void bn_act_from_sums(const Parallel& parallel, const BatchNormArgs& args, const BatchNormGradients& gradients,
                      const double* sums, void* workspace) {
  using T = compute_t<S>;
  const Constants<T> constants(workspace, args.c);
  load_constants(args, constants);
  finish_sums(args, gradients, constants, sums);
  const Backward<S, Act> pass{
      static_cast<const S*>(args.y), nullptr, static_cast<const S*>(gradients.dout),
      static_cast<S*>(gradients.dy), nullptr, gradients.dout ? Work::kResults : Work::kResultsFromDz};
  pass.run(parallel, args, constants);
}

// ---- piece by piece ----

template <class S, class Act>
void act_pixels(const BatchNormArgs& args, const void* y, int64_t pixels, void* out, const void* workspace) {
  const Forward<S, Act> pass{static_cast<const S*>(y), nullptr, static_cast<S*>(out)};
  pass.pixels(0, pixels, args.c, Constants<compute_t<S>>(const_cast<void*>(workspace), args.c));
}

template <class S, class Act>
void gradient_pixels(const BatchNormArgs& args, const void* y, const void* dout, int64_t pixels, void* dy,
                     const void* workspace) {
  const Backward<S, Act> pass{static_cast<const S*>(y), nullptr, static_cast<const S*>(dout),
                              static_cast<S*>(dy),      nullptr, Work::kResults};
  pass.pixels(0, pixels, args.c, Constants<compute_t<S>>(const_cast<void*>(workspace), args.c), nullptr);
}

template <class S, class Act>
void sum_chunk(const BatchNormArgs& args, const void* dout, int64_t chunk, void* out, void* workspace) {
  const Constants<compute_t<S>> constants(workspace, args.c);
  const Chunks chunks(args);
  const int64_t begin = chunks.begin(chunk), pixels = chunks.end(chunk) - begin;
  const S *const y = static_cast<const S*>(args.y) + begin * args.c, *const d =
                                                                         static_cast<const S*>(dout) + begin * args.c;
  compute_t<S>* const partial = constants.partial + chunk * 2 * args.c;
  if (out) {
    const Backward<S, Act, true> pass{y, nullptr, d, nullptr, nullptr, Work::kSums, static_cast<S*>(out)};
    pass.pixels(0, pixels, args.c, constants, partial);
  } else {
    const Backward<S, Act> pass{y, nullptr, d, nullptr, nullptr, Work::kSums};
    pass.pixels(0, pixels, args.c, constants, partial);
  }
}

// ---- gates ----

// Calls body(image, part, begin, end) for every part of an image, in pixels. There are Chunks' parts of each.
template <class Body>
void for_image_parts(const Parallel& parallel, const BatchNormArgs& args, Body&& body) {
  const int64_t parts = Chunks(args).parts;
  parallel.for_each(args.n * parts, [&](int64_t task) {
    const int64_t image = task / parts, part = task % parts, first = image * args.hw;
    body(image, part, first + args.hw * part / parts, first + args.hw * (part + 1) / parts);
  });
}

// out[n, c] = factor * the sum over an image's pixels of activation(z), or of its product with dout.
template <class S, class Act>
void image_sums(const Parallel& parallel, const BatchNormArgs& args, const void* dout, double factor, void* out,
                void* workspace) {
  using T = compute_t<S>;
  const Constants<T> constants(workspace, args.c);
  load_constants(args, constants);
  const S *const y = static_cast<const S*>(args.y), *const d = static_cast<const S*>(dout);
  const int64_t c = args.c, parts = Chunks(args).parts;
  for_image_parts(parallel, args, [&](int64_t image, int64_t part, int64_t begin, int64_t end) {
    T* const sums = constants.partial + (image * parts + part) * c;
    for (int64_t i = 0; i < c; ++i) sums[i] = 0;
    for_pixels<T>(begin, end, c, [=](int64_t pixel, int64_t count, int64_t i, int64_t lanes) CONVEXT_LAMBDA_INLINE {
      const Vec<T> mean = load_as(constants.mean + i, lanes), scale = load_as(constants.scale + i, lanes);
      const Vec<T> shift = load_as(constants.shift + i, lanes);
      Vec<T> sum = Vec<T>::zero();
      for (int64_t x = 0; x < count; ++x) {
        const int64_t at = (pixel + x) * c + i;
        const Vec<T> a = Act::forward(fma(shift, load_as(y + at, lanes) - mean, scale));
        sum = d ? fma(sum, a, load_as(d + at, lanes)) : sum + a;
      }
      store_as(sums + i, load_as(sums + i, lanes) + sum, lanes);
    });
  });
  T* const result = static_cast<T*>(out);
  for (int64_t image = 0; image < args.n; ++image) {
    for (int64_t i = 0; i < c; ++i) {
      double sum = 0;
      for (int64_t part = 0; part < parts; ++part) sum += constants.partial[(image * parts + part) * c + i];
      result[image * c + i] = static_cast<T>(sum * factor);
    }
  }
}

template <class S, class Act>
void gated(const Parallel& parallel, const BatchNormArgs& args, const void* gates, void* out_pointer, void* workspace) {
  using T = compute_t<S>;
  const Constants<T> constants(workspace, args.c);
  load_constants(args, constants);
  const S* const y = static_cast<const S*>(args.y);
  S* const out = static_cast<S*>(out_pointer);
  const int64_t c = args.c;
  for_image_parts(parallel, args, [&](int64_t image, int64_t, int64_t begin, int64_t end) {
    const T* const gate = static_cast<const T*>(gates) + image * c;
    for_pixels<T>(begin, end, c, [=](int64_t pixel, int64_t count, int64_t i, int64_t lanes) CONVEXT_LAMBDA_INLINE {
      const Vec<T> mean = load_as(constants.mean + i, lanes), scale = load_as(constants.scale + i, lanes);
      const Vec<T> shift = load_as(constants.shift + i, lanes), factor = load_as(gate + i, lanes);
      for (int64_t x = 0; x < count; ++x) {
        const int64_t at = (pixel + x) * c + i;
        store_as(out + at, Act::forward(fma(shift, load_as(y + at, lanes) - mean, scale)) * factor, lanes);
      }
    });
  });
}

template <class S, class Act>
void gated_backward(const Parallel& parallel, const BatchNormArgs& args, const void* dout, const BatchNormGates& gates,
                    void* da_pointer, double* all_sums, void* workspace) {
  using T = compute_t<S>;
  const Constants<T> constants(workspace, args.c);
  load_constants(args, constants);
  const S *const y = static_cast<const S*>(args.y), *const d = static_cast<const S*>(dout);
  S* const da = static_cast<S*>(da_pointer);
  const int64_t c = args.c;
  const Chunks chunks(args);
  parallel.for_each(chunks.count, [&](int64_t chunk) {
    T* const sums = constants.partial + chunk * 2 * c;
    for (int64_t i = 0; i < 2 * c; ++i) sums[i] = 0;
    for (int64_t begin = chunks.begin(chunk), end; begin < chunks.end(chunk); begin = end) {
      const int64_t image = begin / args.hw;
      end = smaller(chunks.end(chunk), (image + 1) * args.hw);
      const T* const gate = static_cast<const T*>(gates.gates) + image * c;
      const T* const more = static_cast<const T*>(gates.shifts) + image * c;
      for_pixels<T>(begin, end, c, [=](int64_t pixel, int64_t count, int64_t i, int64_t lanes) CONVEXT_LAMBDA_INLINE {
        const Channel<T> channel = Channel<T>::neighbours(constants, i, lanes);
        const Vec<T> factor = load_as(gate + i, lanes), summand = load_as(more + i, lanes);
        Vec<T> s1 = Vec<T>::zero(), s2 = Vec<T>::zero();
        for (int64_t x = 0; x < count; ++x) {
          const int64_t at = (pixel + x) * c + i;
          const Vec<T> centered = load_as(y + at, lanes) - channel.mean;
          const Vec<T> incoming = fma(summand, load_as(d + at, lanes), factor);
          store_as(da + at, incoming, lanes);
          const Vec<T> dz = incoming * Act::derivative(fma(channel.shift, centered, channel.scale));
          s1 += dz;
          s2 += dz * centered;
        }
        store_as(sums + i, load_as(sums + i, lanes) + s1, lanes);
        store_as(sums + c + i, load_as(sums + c + i, lanes) + s2, lanes);
      });
    }
  });
  add_chunks(parallel, args, constants, all_sums);
}

// ---- the table ----

// Calls visit with the storage type.
template <class Visitor>
void visit_storage(DType dtype, Visitor&& visit) {
  switch (dtype) {
    case DType::kFloat32: return visit(float{});
    case DType::kFloat64: return visit(double{});
    case DType::kBFloat16: return visit(BFloat16{});
    case DType::kFloat16: return visit(Float16{});
  }
}

// The same with the activation of vectors of what such elements are computed in.
template <class Visitor>
void visit_types(const BatchNormArgs& args, Visitor&& visit) {
  visit_storage(args.dtype, [&](auto storage) {
    visit_activation<VecOf<decltype(storage)>>(args.activation, [&](auto act) { visit(storage, act); });
  });
}

int64_t workspace_bytes(const BatchNormArgs& args) {
  const int64_t size = args.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
  const Chunks chunks(args);
  const int64_t rows = larger(2 * chunks.count, args.n * chunks.parts);  // of partial sums
  return 2 * args.c * sizeof(double) + (kConstants + rows) * args.c * size;
}

void batch_stats_table(const Parallel& parallel, const BatchNormArgs& args, double* mean, void* var, void* workspace) {
  const Parallel threads = threads_for(parallel, args);
  visit_storage(args.dtype, [&](auto s) { batch_stats<decltype(s)>(threads, args, mean, var, workspace); });
}

void bn_act_table(const Parallel& parallel, const BatchNormArgs& args, void* out, void* workspace) {
  const Parallel threads = threads_for(parallel, args);
  visit_types(args,
              [&](auto storage, auto act) { bn_act<decltype(storage), decltype(act)>(threads, args, out, workspace); });
}

void bn_act_backward_table(const Parallel& parallel, const BatchNormArgs& args, const BatchNormGradients& gradients,
                           void* workspace) {
  const Parallel threads = threads_for(parallel, args);
  visit_types(args, [&](auto storage, auto act) {
    bn_act_backward<decltype(storage), decltype(act)>(threads, args, gradients, workspace);
  });
}

bool keeps_dz_table(const BatchNormArgs& args) {
  bool keeps = false;
  visit_types(args, [&](auto storage, auto act) { keeps = kKeepsDz<decltype(storage), decltype(act)>; });
  return keeps;
}

void bn_act_and_sums_table(const Parallel& parallel, const BatchNormArgs& args, const void* dout, void* out,
                           const BatchNormSums& found, void* workspace) {
  const Parallel threads = threads_for(parallel, args);
  visit_types(args, [&](auto storage, auto act) {
    bn_act_and_sums<decltype(storage), decltype(act)>(threads, args, dout, out, found, workspace);
  });
}

void bn_act_from_sums_table(const Parallel& parallel, const BatchNormArgs& args, const BatchNormGradients& gradients,
                            const double* sums, void* workspace) {
  const Parallel threads = threads_for(parallel, args);
  visit_types(args, [&](auto storage, auto act) {
    bn_act_from_sums<decltype(storage), decltype(act)>(threads, args, gradients, sums, workspace);
  });
}

void image_sums_table(const Parallel& parallel, const BatchNormArgs& args, const void* dout, double factor, void* out,
                      void* workspace) {
  const Parallel threads = threads_for(parallel, args);
  visit_types(args, [&](auto storage, auto act) {
    image_sums<decltype(storage), decltype(act)>(threads, args, dout, factor, out, workspace);
  });
}

void gated_table(const Parallel& parallel, const BatchNormArgs& args, const void* gates, void* out, void* workspace) {
  const Parallel threads = threads_for(parallel, args);
  visit_types(args, [&](auto storage, auto act) {
    gated<decltype(storage), decltype(act)>(threads, args, gates, out, workspace);
  });
}

void gated_backward_table(const Parallel& parallel, const BatchNormArgs& args, const void* dout,
                          const BatchNormGates& gates, void* da, double* sums, void* workspace) {
  const Parallel threads = threads_for(parallel, args);
  visit_types(args, [&](auto storage, auto act) {
    gated_backward<decltype(storage), decltype(act)>(threads, args, dout, gates, da, sums, workspace);
  });
}

int64_t chunks_of(const BatchNormArgs& args) { return Chunks(args).count; }
int64_t chunk_begin(const BatchNormArgs& args, int64_t chunk) { return Chunks(args).begin(chunk); }

void load_table(const BatchNormArgs& args, void* workspace) {
  visit_storage(args.dtype, [&](auto s) {
    using T = compute_t<decltype(s)>;
    load_constants(args, Constants<T>(workspace, args.c));
  });
}

void load_gradient_table(const BatchNormArgs& args, const BatchNormGradients& gradients, const double* sums,
                         void* workspace) {
  visit_storage(args.dtype, [&](auto s) {
    using T = compute_t<decltype(s)>;
    const Constants<T> constants(workspace, args.c);
    load_constants(args, constants);
    finish_sums(args, gradients, constants, sums);
  });
}

void act_pixels_table(const BatchNormArgs& args, const void* y, int64_t pixels, void* out, const void* workspace) {
  visit_types(args, [&](auto storage, auto act) {
    act_pixels<decltype(storage), decltype(act)>(args, y, pixels, out, workspace);
  });
}

void gradient_pixels_table(const BatchNormArgs& args, const void* y, const void* dout, int64_t pixels, void* dy,
                           const void* workspace) {
  visit_types(args, [&](auto storage, auto act) {
    gradient_pixels<decltype(storage), decltype(act)>(args, y, dout, pixels, dy, workspace);
  });
}

void stats_chunk_table(const BatchNormArgs& args, int64_t chunk, void* workspace) {
  visit_storage(args.dtype, [&](auto s) { stats_chunk<decltype(s)>(args, workspace, chunk); });
}

void finish_stats_table(const Parallel& parallel, const BatchNormArgs& args, double* mean, void* var, void* workspace) {
  const Parallel threads = threads_for(parallel, args);
  visit_storage(args.dtype, [&](auto s) { finish_stats<decltype(s)>(threads, args, mean, var, workspace); });
}

void sum_chunk_table(const BatchNormArgs& args, const void* dout, int64_t chunk, void* out, void* workspace) {
  visit_types(args, [&](auto storage, auto act) {
    sum_chunk<decltype(storage), decltype(act)>(args, dout, chunk, out, workspace);
  });
}

void add_chunks_table(const Parallel& parallel, const BatchNormArgs& args, double* sums, void* workspace) {
  const Parallel threads = threads_for(parallel, args);
  visit_storage(args.dtype,
                [&](auto s) { add_chunks(threads, args, Constants<compute_t<decltype(s)>>(workspace, args.c), sums); });
}

}  // namespace
}  // namespace CONVEXT_ISA

extern const BatchNorm CONVEXT_VARIANT(batch_norm);
const BatchNorm CONVEXT_VARIANT(batch_norm) = {CONVEXT_ISA::workspace_bytes,
                                               CONVEXT_ISA::batch_stats_table,
                                               CONVEXT_ISA::bn_act_table,
                                               CONVEXT_ISA::bn_act_backward_table,
                                               CONVEXT_ISA::keeps_dz_table,
                                               CONVEXT_ISA::bn_act_and_sums_table,
                                               CONVEXT_ISA::bn_act_from_sums_table,
                                               CONVEXT_ISA::chunks_of,
                                               CONVEXT_ISA::chunk_begin,
                                               CONVEXT_ISA::load_table,
                                               CONVEXT_ISA::load_gradient_table,
                                               CONVEXT_ISA::act_pixels_table,
                                               CONVEXT_ISA::gradient_pixels_table,
                                               CONVEXT_ISA::stats_chunk_table,
                                               CONVEXT_ISA::finish_stats_table,
                                               CONVEXT_ISA::sum_chunk_table,
                                               CONVEXT_ISA::add_chunks_table,
                                               CONVEXT_ISA::image_sums_table,
                                               CONVEXT_ISA::gated_table,
                                               CONVEXT_ISA::gated_backward_table};

}  // namespace convext

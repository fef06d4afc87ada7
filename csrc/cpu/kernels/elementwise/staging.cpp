// Strided copies with conversion (staging.h).
//
//   dst[sum_a i_a * dst_stride_a] = convert(src[sum_a i_a * src_stride_a])
//
// Axes of one element are dropped, the others sorted by dst's strides and merged where both sides allow it. What is
// left is one of four cases by the innermost axis of dst:
//
//   rows        src has unit stride there too           vector load, convert, vector store
//   transpose   src has unit stride on another axis     W x W tiles through registers, W lanes (16 floats in AVX-512)
//   pixels      as transpose, but 2 to 4 elements of the one axis are contiguous: the channels of an image
//   elements    neither                                 one at a time; also every rare pair of dtypes
//
//   transpose tile, W = 4:     a0 a1 a2 a3     a0 b0 a2 b2     a0 b0 c0 d0     log2 W steps; step d exchanges the
//                              b0 b1 b2 b3  >  a1 b1 a3 b3  >  a1 b1 c1 d1     off-diagonal d x d blocks of every
//                              c0 c1 c2 c3     c0 d0 c2 d2     a2 b2 c2 d2     2d x 2d block: W/2 pairs of two-source
//                              d0 d1 d2 d3     c1 d1 c3 d3     a3 b3 c3 d3     shuffles a step
//
// Registers: W data + 2 shuffle masks a step. A 16 x 16 tile of floats is 16 loads, 64 shuffles, 16 stores for 2 KiB of
// traffic. Blocks of kBlock x kBlock keep every cache line that the tiles touch in L1 until it is whole. With the 2 to
// 4 channels of an image most rows of a tile would be empty, hence the pixel case.
#include "staging.h"

#include <type_traits>
#include <utility>

#include "cpu/simd/half.h"

namespace convext {
namespace CONVEXT_ISA {
namespace {

constexpr int64_t kBlock = 64;               // elements a side of a transposed block
constexpr int64_t kRowElements = 16 * 1024;  // elements a task of the other two cases copies at least
constexpr int64_t kSerial = 32 * 1024;       // elements below which threads cost more than they bring

struct Axis {
  int64_t size, src, dst;
};

// The index space after dropping, sorting and merging: axis[0] is dst's innermost.
struct Space {
  int rank = 0;
  Axis axis[4];
  int64_t elements = 1;

  Space(const int64_t* size, const int64_t* src_stride, const int64_t* dst_stride) {
    for (int a = 0; a < 4; ++a) {
      elements *= size[a];
      if (size[a] != 1) insert({size[a], src_stride[a], dst_stride[a]});
    }
    merge();
    if (rank == 0) axis[rank++] = {1, 1, 1};
  }

  // The axis along which src is contiguous, or -1.
  int src_unit() const {
    for (int a = 0; a < rank; ++a) {
      if (axis[a].src == 1) return a;
    }
    return -1;
  }

 private:
  void insert(Axis added) {
    int at = rank++;
    for (; at > 0 && axis[at - 1].dst > added.dst; --at) axis[at] = axis[at - 1];
    axis[at] = added;
  }
  void merge() {
    int kept = 0;
    for (int a = 1; a < rank; ++a) {
      Axis& inner = axis[kept];
      const bool contiguous = axis[a].dst == inner.dst * inner.size && axis[a].src == inner.src * inner.size;
      if (contiguous) {
        inner.size *= axis[a].size;
      } else {
        axis[++kept] = axis[a];
      }
    }
    if (rank > 0) rank = kept + 1;
  }
};

// Element offsets of one point of the axes other than `skip_a` and `skip_b`, counted by a single index.
struct Offsets {
  int64_t src = 0, dst = 0;
  Offsets(const Space& space, int64_t index, int skip_a, int skip_b) {
    for (int a = 0; a < space.rank; ++a) {
      if (a == skip_a || a == skip_b) continue;
      const int64_t i = index % space.axis[a].size;
      index /= space.axis[a].size;
      src += i * space.axis[a].src;
      dst += i * space.axis[a].dst;
    }
  }
};

Parallel threads_for(const Parallel& parallel, int64_t elements) {
  return {parallel.run, elements < kSerial ? 1 : parallel.threads};
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- rows ----

template <class S, class D>
void copy_row(const S* src, D* dst, int64_t count) {
  constexpr int64_t width = Vec<compute_t<S>>::width;
  int64_t i = 0;
  for (; i + width <= count; i += width) store_as(dst + i, load_as(src + i));
  if (i < count) store_as(dst + i, load_as(src + i, count - i), count - i);
}

template <class S, class D>
void copy_rows(const Parallel& parallel, const Space& space, const S* src, D* dst) {
  const int64_t length = space.axis[0].size, rows = space.elements / length;
  const int64_t pieces = ceil_div(length, kRowElements), piece = ceil_div(length, pieces);
  const int64_t rows_a_task = length >= kRowElements ? 1 : ceil_div(kRowElements, length);
  parallel.for_each(ceil_div(rows, rows_a_task) * pieces, [&](int64_t task) {
    const int64_t begin = task % pieces * piece, count = smaller(piece, length - begin);
    const int64_t first = task / pieces * rows_a_task, last = smaller(rows, first + rows_a_task);
    for (int64_t row = first; row < last; ++row) {
      const Offsets at(space, row, 0, 0);
      copy_row(src + at.src + begin, dst + at.dst + begin, count);
    }
  });
}

// ---- transpose ----

template <class T, int kDistance, int... kLane>
CONVEXT_INLINE void exchange(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, kLane...>) {
  constexpr int width = Vec<T>::width;
#if defined(__clang__)
  const auto low = __builtin_shufflevector(a.v, b.v, ((kLane & kDistance) ? width + kLane - kDistance : kLane)...);
  const auto high = __builtin_shufflevector(a.v, b.v, ((kLane & kDistance) ? width + kLane : kLane + kDistance)...);
#else
  using Bits = typename Native<T>::bits;
  const auto low = __builtin_shuffle(a.v, b.v, Bits{((kLane & kDistance) ? width + kLane - kDistance : kLane)...});
  const auto high = __builtin_shuffle(a.v, b.v, Bits{((kLane & kDistance) ? width + kLane : kLane + kDistance)...});
#endif
  a = low;
  b = high;
}

template <class T, int kDistance = Vec<T>::width / 2>
CONVEXT_INLINE void transpose_registers(Vec<T> (&v)[Vec<T>::width]) {
  constexpr int width = Vec<T>::width;
  CONVEXT_UNROLL
  for (int i = 0; i < width; ++i) {
    if (!(i & kDistance)) exchange<T, kDistance>(v[i], v[i + kDistance], std::make_integer_sequence<int, width>{});
  }
  if constexpr (kDistance > 1) transpose_registers<T, kDistance / 2>(v);
}

// dst[j * dst_stride + i] = src[i * src_stride + j] for i < rows, j < columns, both at most W.
template <class S, class D>
CONVEXT_INLINE void transpose_tile(const S* src, int64_t src_stride, D* dst, int64_t dst_stride) {
  using T = compute_t<S>;
  constexpr int width = Vec<T>::width;
  Vec<T> v[width];
  CONVEXT_UNROLL
  for (int i = 0; i < width; ++i) v[i] = load_as(src + i * src_stride);
  transpose_registers<T>(v);
  CONVEXT_UNROLL
  for (int j = 0; j < width; ++j) store_as(dst + j * dst_stride, v[j]);
}

template <class S, class D>
__attribute__((noinline)) void transpose_edge(const S* src, int64_t src_stride, D* dst, int64_t dst_stride,
                                              int64_t rows, int64_t columns) {
  using T = compute_t<S>;
  constexpr int width = Vec<T>::width;
  Vec<T> v[width];
  CONVEXT_UNROLL
  for (int i = 0; i < width; ++i) v[i] = i < rows ? load_as(src + i * src_stride, columns) : Vec<T>::zero();
  transpose_registers<T>(v);
  CONVEXT_UNROLL
  for (int j = 0; j < width; ++j) {
    if (j < columns) store_as(dst + j * dst_stride, v[j], rows);
  }
}

template <class S, class D>
void transpose_block(const S* src, int64_t src_stride, D* dst, int64_t dst_stride, int64_t rows, int64_t columns) {
  constexpr int64_t width = Vec<compute_t<S>>::width;
  for (int64_t j = 0; j < columns; j += width) {
    for (int64_t i = 0; i < rows; i += width) {
      const S* const from = src + i * src_stride + j;
      D* const to = dst + j * dst_stride + i;
      if (i + width <= rows && j + width <= columns) {
        transpose_tile(from, src_stride, to, dst_stride);
      } else {
        transpose_edge(from, src_stride, to, dst_stride, smaller(width, rows - i), smaller(width, columns - j));
      }
    }
  }
}

// The few channels of an image: R planes to pixels of R elements, dst[j * R + i] = src[i * plane + j], and back. The
// compiler turns the constant R into shuffles of whole vectors, where a tile would leave most of its rows empty.
template <class T, int R>
void interleave(const T* __restrict src, int64_t plane, T* __restrict dst, int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    for (int i = 0; i < R; ++i) dst[j * R + i] = src[i * plane + j];
  }
}
template <class T, int R>
void deinterleave(const T* __restrict src, T* __restrict dst, int64_t plane, int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    for (int i = 0; i < R; ++i) dst[i * plane + j] = src[j * R + i];
  }
}

// Whether it was such a case.
template <class T>
bool copy_pixels(const Parallel& parallel, const Space& space, int src_unit, const T* src, T* dst) {
  const Axis &rows = space.axis[0], &columns = space.axis[src_unit];
  const bool to_pixels = rows.size <= 4 && columns.dst == rows.size;
  const bool from_pixels = columns.size <= 4 && rows.src == columns.size;
  if (!to_pixels && !from_pixels) return false;
  const int64_t length = to_pixels ? columns.size : rows.size, few = to_pixels ? rows.size : columns.size;
  const int64_t pieces = ceil_div(length, kRowElements / 4), piece = ceil_div(length, pieces);
  parallel.for_each(space.elements / (length * few) * pieces, [&](int64_t task) {
    const Offsets at(space, task / pieces, 0, src_unit);
    const int64_t j = task % pieces * piece, count = smaller(piece, length - j);
    const T* const from = src + at.src + (to_pixels ? j : j * few);
    T* const to = dst + at.dst + (to_pixels ? j * few : j);
    switch (few) {
      case 2:
        return to_pixels ? interleave<T, 2>(from, rows.src, to, count)
                         : deinterleave<T, 2>(from, to, columns.dst, count);
      case 3:
        return to_pixels ? interleave<T, 3>(from, rows.src, to, count)
                         : deinterleave<T, 3>(from, to, columns.dst, count);
      default:
        return to_pixels ? interleave<T, 4>(from, rows.src, to, count)
                         : deinterleave<T, 4>(from, to, columns.dst, count);
    }
  });
  return true;
}

template <class S, class D>
void transpose(const Parallel& parallel, const Space& space, int src_unit, const S* src, D* dst) {
  const Axis &rows = space.axis[0], &columns = space.axis[src_unit];
  const int64_t row_blocks = ceil_div(rows.size, kBlock), column_blocks = ceil_div(columns.size, kBlock);
  const int64_t planes = space.elements / (rows.size * columns.size);
  parallel.for_each(planes * row_blocks * column_blocks, [&](int64_t task) {
    const int64_t i = task % row_blocks * kBlock, j = task / row_blocks % column_blocks * kBlock;
    const Offsets at(space, task / row_blocks / column_blocks, 0, src_unit);
    transpose_block(src + at.src + i * rows.src + j, rows.src, dst + at.dst + j * columns.dst + i, columns.dst,
                    smaller(kBlock, rows.size - i), smaller(kBlock, columns.size - j));
  });
}

// ---- elements ----

double get(const void* src, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat64: return static_cast<const double*>(src)[i];
    case DType::kBFloat16: return load_as(static_cast<const BFloat16*>(src) + i, 1).v[0];
    case DType::kFloat16: return load_as(static_cast<const Float16*>(src) + i, 1).v[0];
    default: return static_cast<const float*>(src)[i];
  }
}

// A double rounded to float such that a later rounding to half gives what rounding the double itself would: an inexact
// result gets an odd last bit ("round to odd"), which remembers on which side of a tie it was.
float to_float_odd(double value) {
  const float nearest = static_cast<float>(value);
  if (!(nearest != value) || nearest != nearest) return nearest;
  int32_t bits;
  __builtin_memcpy(&bits, &nearest, sizeof bits);
  if (__builtin_fabs(static_cast<double>(nearest)) > __builtin_fabs(value)) --bits;  // towards zero
  bits |= 1;
  float odd;
  __builtin_memcpy(&odd, &bits, sizeof odd);
  return odd;
}

void put(void* dst, DType dtype, int64_t i, double value) {
  switch (dtype) {
    case DType::kFloat64: static_cast<double*>(dst)[i] = value; break;
    case DType::kBFloat16: store_as(static_cast<BFloat16*>(dst) + i, Vec<float>(to_float_odd(value)), 1); break;
    case DType::kFloat16: store_as(static_cast<Float16*>(dst) + i, Vec<float>(to_float_odd(value)), 1); break;
    default: static_cast<float*>(dst)[i] = static_cast<float>(value);
  }
}

void copy_elements(const Parallel& parallel, const Space& space, const void* src, DType src_dtype, void* dst,
                   DType dst_dtype) {
  const Axis& inner = space.axis[0];
  const int64_t rows = space.elements / inner.size, rows_a_task = ceil_div(kRowElements, inner.size);
  parallel.for_each(ceil_div(rows, rows_a_task), [&](int64_t task) {
    const int64_t first = task * rows_a_task, last = smaller(rows, first + rows_a_task);
    for (int64_t row = first; row < last; ++row) {
      const Offsets at(space, row, 0, 0);
      for (int64_t i = 0; i < inner.size; ++i) {
        put(dst, dst_dtype, at.dst + i * inner.dst, get(src, src_dtype, at.src + i * inner.src));
      }
    }
  });
}

// ---- the choice ----

template <class S, class D>
void copy_typed(const Parallel& parallel, const Space& space, const void* src, DType src_dtype, void* dst,
                DType dst_dtype) {
  const int src_unit = space.src_unit();
  const bool dst_unit = space.axis[0].dst == 1;
  if (dst_unit && src_unit == 0) {
    copy_rows(parallel, space, static_cast<const S*>(src), static_cast<D*>(dst));
  } else if (dst_unit && src_unit > 0) {
    if constexpr (std::is_same_v<S, D>) {
      if (copy_pixels(parallel, space, src_unit, static_cast<const S*>(src), static_cast<D*>(dst))) return;
    }
    transpose(parallel, space, src_unit, static_cast<const S*>(src), static_cast<D*>(dst));
  } else {
    copy_elements(parallel, space, src, src_dtype, dst, dst_dtype);
  }
}

void copy(const Parallel& all_threads, const void* src, DType src_dtype, const int64_t* src_stride, void* dst,
          DType dst_dtype, const int64_t* dst_stride, const int64_t* size) {
  const Space space(size, src_stride, dst_stride);
  if (space.elements == 0) return;
  const Parallel parallel = threads_for(all_threads, space.elements);
  switch (static_cast<int>(src_dtype) * 4 + static_cast<int>(dst_dtype)) {
#define CONVEXT_COPY(S, from, D, to)                                    \
  case static_cast<int>(DType::from) * 4 + static_cast<int>(DType::to): \
    return copy_typed<S, D>(parallel, space, src, src_dtype, dst, dst_dtype);
    CONVEXT_COPY(float, kFloat32, float, kFloat32)
    CONVEXT_COPY(float, kFloat32, BFloat16, kBFloat16)
    CONVEXT_COPY(float, kFloat32, Float16, kFloat16)
    CONVEXT_COPY(BFloat16, kBFloat16, float, kFloat32)
    CONVEXT_COPY(Float16, kFloat16, float, kFloat32)
    CONVEXT_COPY(BFloat16, kBFloat16, BFloat16, kBFloat16)
    CONVEXT_COPY(double, kFloat64, double, kFloat64)
#undef CONVEXT_COPY
    default: return copy_elements(parallel, space, src, src_dtype, dst, dst_dtype);
  }
}

}  // namespace
}  // namespace CONVEXT_ISA

extern const Staging CONVEXT_VARIANT(staging);
const Staging CONVEXT_VARIANT(staging) = {CONVEXT_ISA::copy};

}  // namespace convext

// What a tile of Winograd's filtering is made of (winograd.h): the transforms, which pixels it covers, and reading it.
#pragma once
#include "winograd.h"

namespace convext::CONVEXT_ISA {
namespace {

using V = Vec<float>;

// ---- The transforms of one row or column; Real is a vector or, for the weights, a vector of float64 ----
//
// input: B^T d, filter: G g, output: A^T m; and, for F(4) alone, what the weight gradient takes:
// output_transposed: A y, filter_transposed: G^T u.

template <int M>
struct Transform;

template <>
struct Transform<2> {
  static CONVEXT_INLINE void input(V (&d)[4]) {
    const V middle = d[2];
    d[0] = d[0] - middle, d[3] = d[1] - d[3];
    d[2] = middle - d[1], d[1] = middle + d[1];
  }
  static CONVEXT_INLINE void output(const V (&m)[4], V (&y)[2]) {
    y[0] = m[0] + (m[1] + m[2]);
    y[1] = (m[1] - m[2]) - m[3];
  }
  template <class Real>
  static CONVEXT_INLINE void filter(Real g0, Real g1, Real g2, Real (&u)[4]) {
    const Real half(0.5), even = half * (g0 + g2), odd = half * g1;
    u[0] = g0, u[1] = even + odd, u[2] = even - odd, u[3] = g2;
  }
};

template <>
struct Transform<3> {
  static constexpr float kP = 0.5f, kQ = 1.25f;

  static CONVEXT_INLINE void input(V (&d)[5]) {
    const V p(kP), q(kQ), p2(kP * kP), q2(kQ * kQ), sum(kP * kP + kQ * kQ), product(kP * kP * kQ * kQ);
    const V even_p = d[3] - q2 * d[1], odd_p = d[2] - q2 * d[0];
    const V even_q = d[3] - p2 * d[1], odd_q = d[2] - p2 * d[0];
    d[4] = (d[4] - sum * d[2]) + product * d[0];
    d[0] = even_p + p * odd_p, d[1] = even_p - p * odd_p;
    d[2] = even_q + q * odd_q, d[3] = even_q - q * odd_q;
  }
  static CONVEXT_INLINE void output(const V (&m)[5], V (&y)[3]) {
    const V p(kP), q(kQ), p2(kP * kP), q2(kQ * kQ);
    const V sum_p = m[0] + m[1], sum_q = m[2] + m[3];
    y[0] = sum_p + sum_q;
    y[1] = p * (m[0] - m[1]) + q * (m[2] - m[3]);
    y[2] = (p2 * sum_p + q2 * sum_q) + m[4];
  }
  template <class Real>
  static CONVEXT_INLINE void filter(Real g0, Real g1, Real g2, Real (&u)[5]) {
    constexpr double p2 = double{kP} * kP, q2 = double{kQ} * kQ;
    constexpr double np = 1 / (2 * kP * (p2 - q2)), nq = 1 / (2 * kQ * (q2 - p2));
    const Real even_p = Real(np) * (g0 + Real(p2) * g2), odd_p = Real(np * kP) * g1;
    const Real even_q = Real(nq) * (g0 + Real(q2) * g2), odd_q = Real(nq * kQ) * g1;
    u[0] = odd_p + even_p, u[1] = odd_p - even_p;
    u[2] = odd_q + even_q, u[3] = odd_q - even_q;
    u[4] = g2;
  }
};

template <>
struct Transform<4> {
  static constexpr float kP = 0.75f, kQ = 1.5f;

  static CONVEXT_INLINE void input(V (&d)[6]) {
    const V p(kP), q(kQ), p2(kP * kP), q2(kQ * kQ), sum(kP * kP + kQ * kQ), product(kP * kP * kQ * kQ);
    const V even_p = d[4] - q2 * d[2], odd_p = d[3] - q2 * d[1];
    const V even_q = d[4] - p2 * d[2], odd_q = d[3] - p2 * d[1];
    d[0] = (d[4] - sum * d[2]) + product * d[0];
    d[5] = (d[5] - sum * d[3]) + product * d[1];
    d[1] = even_p + p * odd_p, d[2] = even_p - p * odd_p;
    d[3] = even_q + q * odd_q, d[4] = even_q - q * odd_q;
  }
  static CONVEXT_INLINE void output(const V (&m)[6], V (&y)[4]) {
    const V p(kP), q(kQ), p2(kP * kP), q2(kQ * kQ), p3(kP * kP * kP), q3(kQ * kQ * kQ);
    const V sum_p = m[1] + m[2], difference_p = m[1] - m[2], sum_q = m[3] + m[4], difference_q = m[3] - m[4];
    y[0] = m[0] + (sum_p + sum_q);
    y[1] = p * difference_p + q * difference_q;
    y[2] = p2 * sum_p + q2 * sum_q;
    y[3] = (p3 * difference_p + q3 * difference_q) + m[5];
  }
  template <class Real>
  static CONVEXT_INLINE void filter(Real g0, Real g1, Real g2, Real (&u)[6]) {
    constexpr double p2 = double{kP} * kP, q2 = double{kQ} * kQ;
    constexpr double np = 1 / (2 * p2 * (p2 - q2)), nq = 1 / (2 * q2 * (q2 - p2));
    const Real even_p = Real(np) * (g0 + Real(p2) * g2), odd_p = Real(np * kP) * g1;
    const Real even_q = Real(nq) * (g0 + Real(q2) * g2), odd_q = Real(nq * kQ) * g1;
    u[0] = Real(1 / (p2 * q2)) * g0;
    u[1] = even_p + odd_p, u[2] = even_p - odd_p;
    u[3] = even_q + odd_q, u[4] = even_q - odd_q;
    u[5] = g2;
  }
  static CONVEXT_INLINE void output_transposed(const V (&y)[4], V (&m)[6]) {
    const V p(kP), q(kQ), p2(kP * kP), q2(kQ * kQ), p3(kP * kP * kP), q3(kQ * kQ * kQ);
    const V even_p = y[0] + p2 * y[2], odd_p = p * y[1] + p3 * y[3];
    const V even_q = y[0] + q2 * y[2], odd_q = q * y[1] + q3 * y[3];
    m[0] = y[0], m[1] = even_p + odd_p, m[2] = even_p - odd_p;
    m[3] = even_q + odd_q, m[4] = even_q - odd_q, m[5] = y[3];
  }
  static CONVEXT_INLINE void filter_transposed(const V (&u)[6], V (&g)[3]) {
    constexpr double p2 = double{kP} * kP, q2 = double{kQ} * kQ;
    constexpr double np = 1 / (2 * p2 * (p2 - q2)), nq = 1 / (2 * q2 * (q2 - p2));
    constexpr auto v = [](double value) { return V(static_cast<float>(value)); };
    const V sum_p = u[1] + u[2], difference_p = u[1] - u[2], sum_q = u[3] + u[4], difference_q = u[3] - u[4];
    g[0] = v(1 / (p2 * q2)) * u[0] + (v(np) * sum_p + v(nq) * sum_q);
    g[1] = v(np * kP) * difference_p + v(nq * kQ) * difference_q;
    g[2] = (v(np * p2) * sum_p + v(nq * q2) * sum_q) + u[5];
  }
};

// Whether some lane is infinite or NaN.
CONVEXT_INLINE bool any_nonfinite(V a) {
  const V zeros = a - a;  // or NaN
  const FloatBits mask = zeros.v != zeros.v;
  int64_t words[kVectorBytes / 8], any = 0;
  __builtin_memcpy(words, &mask, sizeof words);
  CONVEXT_UNROLL
  for (int64_t word : words) any |= word;
  return any != 0;
}

// One vector more than whole rows of tiles: positions a multiple of 4 KiB apart would all fall into the same few sets
// of the first-level cache, and the transforms touch one line of every position at once.
constexpr int64_t skewed(int64_t elements) { return elements + V::width; }

// ---- Tiles ----

// A tile's first output on both axes.
struct Tile {
  int64_t n;
  int32_t h, w;
};

// The tiles that cover a batch of images, all phases of each.
template <int M>
struct Tiles {
  WinogradAxis height, width;
  int32_t rows, columns;  // of one image

  Tiles(const WinogradAxis& vertical, const WinogradAxis& horizontal)
      : height(vertical),
        width(horizontal),
        rows(height.phases() * height.tiles(M)),
        columns(width.phases() * width.tiles(M)) {}

  int64_t count(int64_t batch) const { return batch * rows * columns; }

  CONVEXT_INLINE Tile at(int64_t index) const {
    return {index / columns / rows, first_output(height, index / columns % rows), first_output(width, index % columns)};
  }

 private:
  static CONVEXT_INLINE int32_t first_output(const WinogradAxis& axis, int64_t index) {
    const int32_t tiles = axis.tiles(M);
    return static_cast<int32_t>(index / tiles + index % tiles * M * axis.step);
  }
};

// Outputs of a tile that lie inside the axis.
template <int M>
CONVEXT_INLINE int32_t valid_outputs(const WinogradAxis& axis, int32_t first) {
  const int32_t count = first < axis.out ? (axis.out - first + axis.step - 1) / axis.step : 0;
  return count < M ? count : M;
}

// A square of pixels to come, `step` bytes apart and `line` bytes from row to row. The hardware does not follow as many
// short runs as a tile has rows, so its first touch is a prefetch while the tile before it is transformed. Some of the
// pixels may lie outside the tensor: prefetching an address is no access.
struct Ahead {
  uintptr_t first;
  int64_t line, step;

  template <class T>
  Ahead(const T* tensor, int32_t height, int32_t width, int32_t channels, int64_t n, int64_t h, int64_t w,
        int32_t step_h, int32_t step_w) {
    const int64_t pixel = channels * int64_t{sizeof(T)};
    step = pixel * step_w;
    line = pixel * width * step_h;
    first = reinterpret_cast<uintptr_t>(tensor) + ((n * height + h) * width + w) * pixel;
  }
  // The vector at byte c of the pixels in rows [0, SIZE), columns [SKIP, SIZE).
  template <int SIZE, int SKIP, bool WRITE>
  CONVEXT_INLINE void fetch(int64_t c) const {
    for (int i = 0; i < SIZE; ++i) {
      for (int j = SKIP; j < SIZE; ++j) {
        __builtin_prefetch(reinterpret_cast<const void*>(first + i * line + j * step + c), WRITE, 3);
      }
    }
  }
};

// V of one tile, channels [begin, end): position i * (M + 2) + j goes to v + position * position_pitch. `next` is the
// tile to come.
template <int M, class T>
void gather_tile(const Winograd<T>& g, const T* zeros, Tile tile, Tile next, int32_t begin, int32_t end, float* v,
                 int64_t position_pitch) {
  constexpr int kPatch = M + 2;
  const Ahead ahead(g.in, g.height.in, g.width.in, g.depth, next.n, next.h + int64_t{g.height.offset},
                    next.w + int64_t{g.width.offset}, g.height.step, g.width.step);
  const T* patch[kPatch][kPatch];
  for (int i = 0; i < kPatch; ++i) {
    const int64_t h = int64_t{tile.h} + g.height.offset + int64_t{i} * g.height.step;
    for (int j = 0; j < kPatch; ++j) {
      const int64_t w = int64_t{tile.w} + g.width.offset + int64_t{j} * g.width.step;
      const bool inside = h >= 0 && h < g.height.in && w >= 0 && w < g.width.in;
      patch[i][j] = inside ? g.in + ((tile.n * g.height.in + h) * g.width.in + w) * g.depth : zeros;
    }
  }
  for (int32_t l = begin; l < end; l += V::width) {
    const Lanes<float> lanes(end - l);
    ahead.fetch<kPatch, 2, false>(l * int64_t{sizeof(T)});  // its first two columns are the last two of this tile
    V columns[kPatch][kPatch];                              // [column of d B][row of d]
    CONVEXT_UNROLL
    for (int i = 0; i < kPatch; ++i) {
      V d[kPatch];
      CONVEXT_UNROLL
      for (int j = 0; j < kPatch; ++j) d[j] = load_as(patch[i][j] + l, lanes);
      Transform<M>::input(d);
      CONVEXT_UNROLL
      for (int j = 0; j < kPatch; ++j) columns[j][i] = d[j];
    }
    CONVEXT_UNROLL
    for (int j = 0; j < kPatch; ++j) {
      Transform<M>::input(columns[j]);
      CONVEXT_UNROLL
      for (int i = 0; i < kPatch; ++i) store(v + (i * kPatch + j) * position_pitch + l - begin, columns[j][i]);
    }
  }
}

}  // namespace
}  // namespace convext::CONVEXT_ISA

// Brings the operands of fprop and dgrad into shared memory, 16 bytes a copy: channels of a group come in whole chunks
// and lie side by side (NHWC).
//
// What a step of the main loop costs here is one XOR of a lane's bits with its row's, one multiply-add for the address
// and the copy itself, so everything else is known before the loop:
//   - each row of A has a pointer to where tap (0, 0) reads, and a word with a bit for each filter column and row whose
//     read lies in the image;
//   - a Walk has, for the taps, one offset from all those pointers, and the bits of the tap's column and row.
// Offsets count chunks of 16 bytes in 32 bits, which reach over 32 GiB.
#pragma once
#include <type_traits>

#include "igemm_block.h"

namespace convext::cuda {

// What moves a Walk past a tap, the same for all threads: in shared memory, since registers are few and taps seldom
// end.
// Of each operand that it moves through, what its offset gains at the next tap, and besides at the next row of taps.
struct WalkSteps {
  uint32_t first_column, end_column;
  int32_t tap[2], row[2];
};
constexpr int kWalkBytes = 2 * 32;  // of shared memory, behind the stages: for two walks
static_assert(sizeof(WalkSteps) <= kWalkBytes / 2);

// Where in the reduction a thread stands: channels innermost, then the taps of a row, then the rows. OFFSETS: how many
// operands it moves through.
template <int OFFSETS>
struct Walk {
  int32_t at, extent;             // channel, of so many, in units of the loader's
  uint32_t column, row, end_row;  // bit s; bit S + r; that of the row after the last
  int32_t offset[OFFSETS];
  uint32_t steps;  // WalkSteps, in shared memory

  CONVEXT_DEVICE void carry() {
    while (at >= extent && row != end_row) {
      const auto step = [&](int word) { return ptx::load_shared(steps + word * 4); };
      at -= extent;
      column <<= 1;
#pragma unroll
      for (int i = 0; i < OFFSETS; ++i) offset[i] += static_cast<int32_t>(step(2 + i));
      if (column == step(1)) {
        column = step(0), row <<= 1;
#pragma unroll
        for (int i = 0; i < OFFSETS; ++i) offset[i] += static_cast<int32_t>(step(4 + i));
      }
    }
  }
  // Whether what it stands at is outside of something with such bits. None has the bit of the row after the last.
  CONVEXT_DEVICE bool is_outside(uint32_t bits) const { return ((column | row) & ~bits) != 0; }
};

template <class TILE, bool DGRAD>
struct VectorLoader {
  using T = typename TILE::T;
  static constexpr int CHUNK = TILE::CHUNK, K_CHUNKS = TILE::K_CHUNKS, BLOCK_K = TILE::BLOCK_K;
  // K-major operands: a thread has one chunk of the reduction in rows STRIDE apart, a multiple of the swizzle's eight.
  static constexpr int STRIDE = TILE::THREADS / K_CHUNKS;
  static constexpr int A_ROWS = TILE::BLOCK_M / STRIDE;
  // The N-major one: it has some chunks, SHARE apart, of one row, and so one place in the reduction.
  static constexpr int SHARE = TILE::THREADS / BLOCK_K;
  static constexpr int B_COPIES = DGRAD ? TILE::BLOCK_N / CHUNK / SHARE : TILE::BLOCK_N / STRIDE;
  static_assert(STRIDE % 8 == 0 && TILE::BLOCK_M % STRIDE == 0 && (DGRAD || TILE::BLOCK_N % STRIDE == 0));
  static_assert(TILE::THREADS % BLOCK_K == 0 && B_COPIES >= 1);

  // Where registers are few, four rows' words wait in shared memory for the moment in each step that they are used in,
  // and a row's pointer is an offset from the tensor's start, at the price of an addition.
  static constexpr int STASHED = TILE::BLOCKS > 1 && TILE::MMA_M* TILE::MMA_N * 4 >= 64 ? 4 : 0;
  static constexpr bool NARROW = STASHED > 0;
  static constexpr int SCRATCH_BYTES = kWalkBytes + (STASHED ? 2 * 16 * TILE::THREADS : 0);
  using Pixel = std::conditional_t<NARROW, int32_t, uintptr_t>;

  int32_t steps;
  uintptr_t input;
  uint32_t stash;         // of a thread, from a_to on, which differs for all
  Pixel a_pixel[A_ROWS];  // where tap (0, 0) reads: perhaps nowhere
  uint32_t a_taps[A_ROWS];
  uint32_t a_to, b_to;  // in a stage; fprop has both operands in the same places
  uintptr_t b_from;
  int32_t b_count;        // of this thread's copies that are columns of w
  int32_t filter_chunks;  // of a filter
  Walk<DGRAD ? 1 : 2> walk;
  Walk<1> b_walk;  // dgrad

  CONVEXT_DEVICE VectorLoader(const ConvProblem& problem, const PixelsBlock<TILE, DGRAD>& block, const Strides& strides,
                              const T* in, const T* w, int32_t chunks_of_filter, uint32_t scratch)
      : filter_chunks(chunks_of_filter) {
    input = reinterpret_cast<uintptr_t>(in);
    Range taps_h, taps_w;
    block.active(taps_h, taps_w);
    const int32_t wide = taps_w.end - taps_w.begin, count = (taps_h.end - taps_h.begin) * wide;
    const int32_t chunks = block.channels / CHUNK, tid = threadIdx.x, chunk = tid % K_CHUNKS, row = tid / K_CHUNKS;
    steps = static_cast<int32_t>((int64_t{count} * chunks + K_CHUNKS - 1) / K_CHUNKS);

#pragma unroll
    for (int i = 0; i < A_ROWS; ++i) {
      int32_t n, y, x;
      const int32_t m = block.m0 + row + i * STRIDE;
      block.decode(m < block.gemm_m ? m : block.m0, n, y, x);
      y = block.rows.input(y, 0), x = block.cols.input(x, 0);
      const int64_t at = n * strides.n + y * strides.h + x * strides.w + int64_t{block.group} * block.channels;
      if constexpr (NARROW) {
        a_pixel[i] = static_cast<int32_t>(at / CHUNK);
      } else {
        a_pixel[i] = input + static_cast<uintptr_t>(at * int64_t{sizeof(T)});
      }
      a_taps[i] = 0;
      if (m >= block.gemm_m) continue;
      for (int32_t s = taps_w.begin; s < taps_w.end; ++s) {
        const int32_t column = x + s * block.cols.in_tap_step;
        a_taps[i] |= uint32_t{column >= 0 && column < block.cols.in} << s;
      }
      for (int32_t r = taps_h.begin; r < taps_h.end; ++r) {
        const int32_t line = y + r * block.rows.in_tap_step;
        a_taps[i] |= uint32_t{line >= 0 && line < block.rows.in} << (problem.s + r);
      }
    }

    WalkSteps moves[2];
    const auto start = [&](auto& of, int which, int32_t first, int32_t extent) {
      of.at = first, of.extent = extent;
      of.column = moves[which].first_column = 1u << taps_w.begin, moves[which].end_column = 1u << taps_w.end;
      of.row = 1u << (problem.s + taps_h.begin), of.end_row = 1u << (problem.s + taps_h.end);
      of.steps = scratch + which * 32;
    };
    const auto move = [&](auto& of, int which, int i, int32_t to_channel, int32_t to_column, int32_t to_row) {
      of.offset[i] = of.at * to_channel + taps_w.begin * to_column + taps_h.begin * to_row;
      moves[which].tap[i] = to_column - of.extent * to_channel;
      moves[which].row[i] = to_row - wide * to_column;
    };
    start(walk, 0, chunk, chunks);
    move(walk, 0, 0, 1, block.cols.in_tap_step * static_cast<int32_t>(strides.w / CHUNK),
         block.rows.in_tap_step * static_cast<int32_t>(strides.h / CHUNK));
    a_to = k_major_offset<TILE::ROW_BYTES>(row, chunk);

    const int32_t filters = DGRAD ? block.channels : block.columns, width = DGRAD ? block.columns : block.channels;
    const int32_t pixel = width / CHUNK, taps = problem.r * problem.s;  // chunks of a tap; taps of a filter
    const auto filter = [&](int32_t k, int32_t c) {
      const int64_t at = (int64_t{block.group} * filters + k) * taps * width + c;
      return reinterpret_cast<uintptr_t>(w) + static_cast<uintptr_t>(at * int64_t{sizeof(T)});
    };
    int32_t left, apart;  // columns from this thread's first one on, and between its copies
    if constexpr (DGRAD) {
      const int32_t line = tid / SHARE, share = tid % SHARE, column = block.n0 + share * CHUNK;
      start(b_walk, 1, line, block.channels);
      move(b_walk, 1, 0, taps * pixel, block.cols.tap_step * pixel, block.rows.tap_step * problem.s * pixel);
      b_from = filter(0, column) +
               static_cast<uintptr_t>(16 * int64_t{pixel} * (block.rows.tap_first * problem.s + block.cols.tap_first));
      b_to = TILE::A_BYTES + mn_major_offset<T, TILE::BLOCK_N>(line, share);
      left = block.columns - column, apart = SHARE * CHUNK;
    } else {
      move(walk, 0, 1, 1, pixel, problem.s * pixel);
      b_from = filter(block.n0 + row, 0);
      left = block.columns - block.n0 - row, apart = STRIDE;
    }
    b_count = left <= 0 ? 0 : (left + apart - 1) / apart;
    a_to = keep(a_to);
    if constexpr (STASHED) {
      stash = scratch + kWalkBytes;
      ptx::store_shared_16(stash + a_to,
                           {uint32_t(a_pixel[0]), uint32_t(a_pixel[1]), uint32_t(a_pixel[2]), uint32_t(a_pixel[3])});
      ptx::store_shared_16(stash + a_to + 16 * TILE::THREADS, {a_taps[0], a_taps[1], a_taps[2], a_taps[3]});
    }
    if constexpr (DGRAD) b_to = keep(b_to);

#pragma unroll
    for (int i = 0; i < (DGRAD ? 2 : 1); ++i) {
      if (tid != 0) continue;
      const WalkSteps& of = moves[i];
      ptx::store_shared_16(scratch + i * 32,
                           {of.first_column, of.end_column, uint32_t(of.tap[0]), uint32_t(of.tap[1])});
      ptx::store_shared_16(scratch + i * 32 + 16, {uint32_t(of.row[0]), uint32_t(of.row[1]), 0, 0});
    }
    __syncthreads();  // the steps are written before anyone walks
    walk.carry();
    if constexpr (DGRAD) b_walk.carry();
  }

  static CONVEXT_DEVICE const void* at(uintptr_t from, int32_t chunks) {
    return reinterpret_cast<const void*>(from + static_cast<uintptr_t>(int64_t{chunks} * 16));
  }

  // Starts this thread's copies of the next step into a stage, and moves on.
  CONVEXT_DEVICE void load_stage(uint32_t stage) {
    if constexpr (STASHED) {
      const uint4 pixels = ptx::load_shared_16(stash + a_to),
                  taps = ptx::load_shared_16(stash + a_to + 16 * TILE::THREADS);
      load_a(stage, 0, static_cast<int32_t>(pixels.x), taps.x);
      load_a(stage, 1, static_cast<int32_t>(pixels.y), taps.y);
      load_a(stage, 2, static_cast<int32_t>(pixels.z), taps.z);
      load_a(stage, 3, static_cast<int32_t>(pixels.w), taps.w);
    }
#pragma unroll
    for (int i = STASHED; i < A_ROWS; ++i) load_a(stage, i, a_pixel[i], a_taps[i]);
#pragma unroll
    for (int i = 0; i < B_COPIES; ++i) load_b(stage, i);
    advance();
  }
  CONVEXT_DEVICE void load_a(uint32_t stage, int i, Pixel pixel, uint32_t taps) const {
    const void* from;
    if constexpr (NARROW) {
      from = at(input, pixel + walk.offset[0]);
    } else {
      from = at(pixel, walk.offset[0]);
    }
    ptx::cp_async_16(stage + a_to + i * STRIDE * TILE::ROW_BYTES, from, !walk.is_outside(taps));
  }
  CONVEXT_DEVICE void load_b(uint32_t stage, int i) const {
    if constexpr (DGRAD) {
      constexpr int TURNED =
          TILE::BLOCK_N * sizeof(T) >= 128 ? 127 : 63;  // bits of the distance that the swizzle turns
      constexpr int DISTANCE = SHARE * 16;
      ptx::cp_async_16(((stage + b_to) ^ (i * DISTANCE & TURNED)) + (i * DISTANCE & ~TURNED),
                       static_cast<const unsigned char*>(at(b_from, b_walk.offset[0])) + i * DISTANCE,
                       b_walk.row != b_walk.end_row && i < b_count);
    } else {
      ptx::cp_async_16(stage + a_to + TILE::A_BYTES + i * STRIDE * TILE::ROW_BYTES,
                       at(b_from, walk.offset[1] + i * STRIDE * filter_chunks),
                       walk.row != walk.end_row && i < b_count);
    }
  }
  CONVEXT_DEVICE void advance() {
    walk.at += K_CHUNKS, walk.offset[0] += K_CHUNKS;
    if constexpr (DGRAD) {
      b_walk.at += BLOCK_K, b_walk.offset[0] += BLOCK_K * filter_chunks;
      b_walk.carry();
    } else {
      walk.offset[1] += K_CHUNKS;
    }
    walk.carry();
  }
};

// Why the loader cannot take the problem, or nullptr.
template <class TILE, bool DGRAD>
const char* reject_vector_loader(const ConvProblem& p) {
  constexpr int CHUNK = TILE::CHUNK;
  if (p.x_layout != Layout::kNHWC || p.y_layout != Layout::kNHWC) return "it takes channels-last tensors alone";
  if (p.c_per_group() % CHUNK || p.k_per_group() % CHUNK) {
    return "the channels of a group are not a multiple of 16 bytes";
  }
  if (p.r + p.s > 31) return "the filter's height and width add up to more than 31";
  const double width = DGRAD ? double(p.q()) * p.k : double(p.w) * p.c, channels = DGRAD ? p.k : p.c;
  const double reach = (double(p.r) * p.dil_h + 1) * width + (double(p.s) * p.dil_w + 1) * channels;
  if (std::max(reach, double(p.w_size())) / CHUNK > INT32_MAX / 2) return "the filter, or its reach, exceeds 16 GiB";
  const double size = double(DGRAD ? p.y_size() : p.x_size()) + reach;
  if (VectorLoader<TILE, DGRAD>::NARROW && size / CHUNK > INT32_MAX / 2) return "the tensor exceeds 16 GiB";
  return nullptr;
}

}  // namespace convext::cuda

// The matrix-product half of the direct kernels: tiles in shared memory, fragments, one k step of a warp.
//
// A stage holds two operand tiles, each in one of two forms:
//   K-major   [row][64 bytes of k]: what lies side by side in memory is the reduction; fragments come by ldmatrix
//   MN-major  [k][row]: what lies side by side is gemm_m or gemm_n; ldmatrix.trans, or 32-bit loads for tf32
// The 16-byte chunks of a row are XORed with bits of the row number, so that neither the copies in nor the fragment
// loads out meet a bank twice.
#pragma once
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/mma.h"

namespace convext::cuda {

// Extents of a block's tile. The reduction advances by 64 bytes, two mma steps, at a time.
template <class T_, int M, int N, int WARPS_M_, int WARPS_N_, int STAGES_>
struct Tile {
  using T = T_;
  static constexpr int BLOCK_M = M, BLOCK_N = N, BLOCK_K = 64 / sizeof(T);
  static constexpr int WARPS_M = WARPS_M_, WARPS_N = WARPS_N_, STAGES = STAGES_;
  static constexpr int THREADS = 32 * WARPS_M * WARPS_N;
  static constexpr int WARP_M = M / WARPS_M, WARP_N = N / WARPS_N;
  static constexpr int CHUNK = 16 / sizeof(T);   // elements of one 16-byte chunk
  static constexpr int STEP_K = 32 / sizeof(T);  // reduction of one mma
  static constexpr int MMA_M = WARP_M / 16, MMA_N = WARP_N / 8;
  static constexpr int A_BYTES = M * 64, B_BYTES = N * 64, STAGE_BYTES = A_BYTES + B_BYTES;
  static_assert(WARP_M % 16 == 0 && WARP_N % 16 == 0 && STAGES >= 2);

  // The accumulators pass through shared memory, 16 rows a warp at a time. 8 words of padding keep the banks apart.
  static constexpr int SLAB_PITCH = WARP_N + 8;
  static constexpr int SLAB_BYTES = WARPS_M * WARPS_N * 16 * SLAB_PITCH * 4;
  static constexpr int SHARED_BYTES = STAGES * STAGE_BYTES > SLAB_BYTES ? STAGES * STAGE_BYTES : SLAB_BYTES;
};

// Byte offset of chunk `chunk` of row `row` in a K-major tile: two rows share 128 bytes.
CONVEXT_DEVICE uint32_t k_major_offset(int row, int chunk) {
  return static_cast<uint32_t>(row * 64 + ((chunk ^ (row >> 1)) & 3) * 16);
}

// The same for an MN-major tile of ROWS elements a k: eight k of one chunk, or the four k and two chunks that a tf32
// fragment takes at once, lie in different banks.
template <class T, int ROWS>
CONVEXT_DEVICE uint32_t mn_major_offset(int k, int chunk) {
  constexpr int ROW_BYTES = ROWS * sizeof(T);
  const int turn = sizeof(T) == 4 ? 2 * (k & 3) : ROW_BYTES >= 128 ? k & 7 : (k >> 1) & 3;
  return static_cast<uint32_t>(k * ROW_BYTES + (chunk ^ turn) * 16);
}

// The A fragment of the 16 rows from `row` on, reduction step `step`.
template <class T, bool K_MAJOR, int ROWS>
CONVEXT_DEVICE void load_a_fragment(uint32_t (&a)[4], const unsigned char* tile, int row, int step) {
  const int lane = threadIdx.x % 32;
  constexpr int CHUNK = 16 / sizeof(T);
  if constexpr (K_MAJOR) {
    ptx::ldmatrix_x4(a, ptx::shared_address(tile) + k_major_offset(row + lane % 16, step * 2 + lane / 16));
  } else if constexpr (sizeof(T) == 2) {
    const int k = step * 16 + lane % 8 + lane / 16 * 8;
    ptx::ldmatrix_x4_trans(a, ptx::shared_address(tile) + mn_major_offset<T, ROWS>(k, row / CHUNK + lane / 8 % 2));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int m = row + lane / 4 + 8 * (i % 2), k = step * 8 + lane % 4 + 4 * (i / 2);
      a[i] = *reinterpret_cast<const uint32_t*>(tile + mn_major_offset<T, ROWS>(k, m / CHUNK) + m % CHUNK * 4);
    }
  }
}

// The B fragments of the 16 columns from `col` on: b[0], b[1] of the first 8, b[2], b[3] of the others.
template <class T, bool K_MAJOR, int COLS>
CONVEXT_DEVICE void load_b_fragments(uint32_t (&b)[4], const unsigned char* tile, int col, int step) {
  const int lane = threadIdx.x % 32;
  constexpr int CHUNK = 16 / sizeof(T);
  if constexpr (K_MAJOR) {
    const int row = col + lane % 8 + lane / 16 * 8;
    ptx::ldmatrix_x4(b, ptx::shared_address(tile) + k_major_offset(row, step * 2 + lane / 8 % 2));
  } else if constexpr (sizeof(T) == 2) {
    ptx::ldmatrix_x4_trans(
        b, ptx::shared_address(tile) + mn_major_offset<T, COLS>(step * 16 + lane % 16, col / CHUNK + lane / 16));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int n = col + lane / 4 + 8 * (i / 2), k = step * 8 + lane % 4 + 4 * (i % 2);
      b[i] = *reinterpret_cast<const uint32_t*>(tile + mn_major_offset<T, COLS>(k, n / CHUNK) + n % CHUNK * 4);
    }
  }
}

template <class T>
CONVEXT_DEVICE void round_operand(uint32_t (&fragment)[4]) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment[i] = ptx::round_to_tf32(fragment[i]);
  }
}

// acc += A * B for one stage, this warp's part.
template <class TILE, bool A_K_MAJOR, bool B_K_MAJOR>
CONVEXT_DEVICE void multiply_stage(float (&acc)[TILE::MMA_M][TILE::MMA_N][4], const unsigned char* a_tile,
                                   const unsigned char* b_tile, int warp_m, int warp_n) {
  using T = typename TILE::T;
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    uint32_t a[TILE::MMA_M][4], b[TILE::MMA_N / 2][4];
#pragma unroll
    for (int i = 0; i < TILE::MMA_M; ++i) {
      load_a_fragment<T, A_K_MAJOR, TILE::BLOCK_M>(a[i], a_tile, warp_m * TILE::WARP_M + i * 16, step);
      round_operand<T>(a[i]);
    }
#pragma unroll
    for (int j = 0; j < TILE::MMA_N / 2; ++j) {
      load_b_fragments<T, B_K_MAJOR, TILE::BLOCK_N>(b[j], b_tile, warp_n * TILE::WARP_N + j * 16, step);
      round_operand<T>(b[j]);
    }
#pragma unroll
    for (int i = 0; i < TILE::MMA_M; ++i) {
#pragma unroll
      for (int j = 0; j < TILE::MMA_N; ++j) {
        const uint32_t columns[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
        ptx::mma<T>(acc[i][j], a[i], columns);
      }
    }
  }
}

// 16 bytes into shared memory through registers, for what cp.async cannot gather.
template <class T>
CONVEXT_DEVICE void store_chunk(unsigned char* destination, const Vector<T>& chunk) {
  uint4 raw;
  memcpy(&raw, &chunk, sizeof raw);
  *reinterpret_cast<uint4*>(destination) = raw;
}

}  // namespace convext::cuda

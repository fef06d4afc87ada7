// The matrix-product half of the direct kernels: tiles in shared memory, fragments, one stage of a warp.
//
// A stage holds two operand tiles, each in one of two forms:
//   K-major   [row][ROW_BYTES of k]: what lies side by side in memory is the reduction; fragments come by ldmatrix
//   MN-major  [k][row]: what lies side by side is gemm_m or gemm_n; ldmatrix.trans, or 32-bit loads for tf32
// The 16-byte chunks of a row are XORed with bits of the row number, so that neither the copies in nor the fragment
// loads out meet a bank twice.
//
// Shared memory is addressed by 32 bits throughout. What a lane adds to a stage's address is known before the loop, and
// since XOR acts on bits that a stage's start leaves zero, the next fragment or mma step is one XOR, or a constant
// distance, away.
#pragma once
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/mma.h"
#include "cuda/ptx/shared.h"

namespace convext::cuda {

// Extents of a block's tile. The reduction advances by ROW_BYTES, an mma step for every 32 of them, at a time.
// BLOCKS: how many blocks a multiprocessor is to hold, which bounds the registers of a thread.
template <class T_, int M, int N, int WARPS_M_, int WARPS_N_, int STAGES_, int BLOCKS_, int ROW_BYTES_ = 128>
struct Tile {
  using T = T_;
  static constexpr int BLOCK_M = M, BLOCK_N = N, ROW_BYTES = ROW_BYTES_, BLOCK_K = ROW_BYTES / sizeof(T);
  static constexpr int WARPS_M = WARPS_M_, WARPS_N = WARPS_N_, STAGES = STAGES_, BLOCKS = BLOCKS_;
  static constexpr int THREADS = 32 * WARPS_M * WARPS_N;
  static constexpr int WARP_M = M / WARPS_M, WARP_N = N / WARPS_N;
  static constexpr int CHUNK = 16 / sizeof(T), K_CHUNKS = ROW_BYTES / 16;  // elements of a chunk, chunks of a step
  static constexpr int STEP_K = 32 / sizeof(T);                            // reduction of one mma
  static constexpr int MMA_M = WARP_M / 16, MMA_N = WARP_N / 8, MMA_K = ROW_BYTES / 32;
  static constexpr int A_BYTES = M * ROW_BYTES, B_BYTES = N * ROW_BYTES, STAGE_BYTES = A_BYTES + B_BYTES;
  // Whether the fragments of two mma steps fit beside the accumulators.
  static constexpr bool AHEAD = 4 * (MMA_M * MMA_N + 2 * MMA_M + MMA_N) <= (THREADS * BLOCKS > 256 ? 80 : 192);
  static_assert(WARP_M % 16 == 0 && WARP_N % 16 == 0 && STAGES >= 2);
  static_assert(A_BYTES % 1024 == 0 && STAGE_BYTES % 1024 == 0, "XOR needs tiles that start at whole rows of banks");

  // The accumulators pass through shared memory, 16 rows a warp at a time. 8 words of padding keep the banks apart.
  static constexpr int SLAB_PITCH = WARP_N + 8;
  static constexpr int SLAB_BYTES = WARPS_M * WARPS_N * 16 * SLAB_PITCH * 4;
  static constexpr int SHARED_BYTES = STAGES * STAGE_BYTES > SLAB_BYTES ? STAGES * STAGE_BYTES : SLAB_BYTES;
};

// Byte offset of chunk `chunk` of row `row` in a K-major tile. Rows of 64 bytes share 128 of them by twos.
template <int ROW_BYTES>
CONVEXT_DEVICE uint32_t k_major_offset(int row, int chunk) {
  const int turn = ROW_BYTES == 128 ? row & 7 : (row >> 1) & 3;
  return static_cast<uint32_t>(row * ROW_BYTES + (chunk ^ turn) * 16);
}

// The same for an MN-major tile of ROWS elements a k. Eight k of one chunk lie in different banks, which is what
// ldmatrix reads, and so do two k of four chunks or four k of two, which is what eight threads copy at once: the turn
// is the number of the row with its bits reversed. For tf32 without the last of them: a fragment takes four k and two
// chunks at once, and eight threads copy two k of four chunks.
template <class T, int ROWS>
CONVEXT_DEVICE uint32_t mn_major_offset(int k, int chunk) {
  constexpr int BYTES = ROWS * sizeof(T);
  const int reversed = BYTES >= 128 ? (k & 1) << 2 | (k & 2) | (k >> 2 & 1) : (k >> 1 & 1) << 1 | (k >> 2 & 1);
  return static_cast<uint32_t>(k * BYTES + (chunk ^ (sizeof(T) == 4 ? reversed & 6 : reversed)) * 16);
}

// The value, which the compiler cannot work out again where it is used: it would, inside the main loop, from the number
// of the thread, to save a register.
CONVEXT_DEVICE uint32_t keep(uint32_t value) { return __shfl_xor_sync(~0u, value, 0); }

// Where the fragments of an operand lie for this lane: COUNT fragments of 16 rows each, from the warp's first row on.
// `offset` belongs to fragment 0 and step 0.
template <class TILE, bool IS_A, bool K_MAJOR>
struct Fragments {
  using T = typename TILE::T;
  static constexpr int ROWS = IS_A ? TILE::BLOCK_M : TILE::BLOCK_N, WARP_ROWS = IS_A ? TILE::WARP_M : TILE::WARP_N;
  static constexpr int COUNT = WARP_ROWS / 16;
  static constexpr int CHUNKS = 16 / TILE::CHUNK;  // of a fragment's rows in an MN-major tile
  uint32_t offset;

  CONVEXT_DEVICE explicit Fragments(int warp) {
    const int lane = threadIdx.x % 32, first = warp * WARP_ROWS;
    if constexpr (K_MAJOR) {
      offset = IS_A ? k_major_offset<TILE::ROW_BYTES>(first + lane % 16, lane / 16)
                    : k_major_offset<TILE::ROW_BYTES>(first + lane % 8 + lane / 16 * 8, lane / 8 % 2);
    } else if constexpr (sizeof(T) == 2) {
      offset = IS_A ? mn_major_offset<T, ROWS>(lane % 8 + lane / 16 * 8, first / TILE::CHUNK + lane / 8 % 2)
                    : mn_major_offset<T, ROWS>(lane % 16, first / TILE::CHUNK + lane / 16);
    } else {
      const int row = first + lane / 4;
      offset = mn_major_offset<T, ROWS>(lane % 4, row / TILE::CHUNK) + row % TILE::CHUNK * 4;
    }
    offset = keep(offset);
  }

  // Fragment `i` of step `step`; both are known to the compiler. A: a[0..3] of 16 rows. B: b[0], b[1] of the first 8
  // columns, b[2], b[3] of the others.
  CONVEXT_DEVICE void load(uint32_t (&fragment)[4], uint32_t tile, int i, int step) const {
    const uint32_t at = tile + offset;
    if constexpr (K_MAJOR) {
      ptx::ldmatrix_x4(fragment, (at ^ (step * 32)) + i * 16 * TILE::ROW_BYTES);
    } else if constexpr (sizeof(T) == 2) {
      // A warp's rows start at a multiple of their number, so that fragment i differs in bits of its own.
      ptx::ldmatrix_x4_trans(fragment, (at ^ (i * CHUNKS * 16)) + step * 16 * ROWS * 2);
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row_half = IS_A ? e % 2 : e / 2, k_half = IS_A ? e / 2 : e % 2;
        fragment[e] =
            ptx::load_shared((at ^ (i * CHUNKS * 16) ^ (row_half * 2 * 16)) + (step * 8 + k_half * 4) * ROWS * 4);
      }
    }
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int e = 0; e < 4; ++e) fragment[e] = ptx::round_to_tf32(fragment[e]);
    }
  }
};

// acc += A * B for one stage, this warp's part. Where registers allow it (AHEAD) the fragments of the next step are on
// their way while this one multiplies. Elsewhere the columns' are, and of the rows' those of the next 16: other warps
// fill the gap, and two steps are unrolled, of tf32 one: of more the compiler would mix so many that registers spill.
// copy() starts the copies of another stage: all together, since the compiler puts three loads of nothing before each
// group of them, and first, while fragments take no registers.
template <class TILE, bool AHEAD, class A, class B, class Copy>
CONVEXT_DEVICE void multiply_stage(float (&acc)[TILE::MMA_M][TILE::MMA_N][4], const A& a_lane, const B& b_lane,
                                   uint32_t stage, Copy&& copy) {
  constexpr int ROWS = AHEAD ? 2 * TILE::MMA_M : 2;  // fragments of A at a time
  constexpr int UNROLLED = AHEAD ? TILE::MMA_K : sizeof(typename TILE::T) == 4 ? 1 : 2;
  uint32_t a[ROWS][4], b[AHEAD ? 2 : 1][TILE::MMA_N / 2][4];
  const auto load_a = [&](int step, int i) { a_lane.load(a[(step * TILE::MMA_M + i) % ROWS], stage, i, step); };
  const auto load_b = [&](int step) {
#pragma unroll
    for (int j = 0; j < TILE::MMA_N / 2; ++j) b_lane.load(b[AHEAD ? step % 2 : 0][j], stage + TILE::A_BYTES, j, step);
  };
  const auto load = [&](int step) {
    load_b(step);
#pragma unroll
    for (int i = 0; i < (AHEAD ? TILE::MMA_M : 1); ++i) load_a(step, i);
  };
  copy();
  if (AHEAD) load(0);
#pragma unroll UNROLLED
  for (int step = 0; step < TILE::MMA_K; ++step) {
    if (!AHEAD) load(step);
    if (AHEAD && step + 1 < TILE::MMA_K) load(step + 1);
#pragma unroll
    for (int i = 0; i < TILE::MMA_M; ++i) {
      if (!AHEAD && i + 1 < TILE::MMA_M) load_a(step, i + 1);
#pragma unroll
      for (int j = 0; j < TILE::MMA_N; ++j) {
        const auto& columns = b[AHEAD ? step % 2 : 0][j / 2];
        const uint32_t half[2] = {columns[j % 2 * 2], columns[j % 2 * 2 + 1]};
        ptx::mma<typename TILE::T>(acc[i][j], a[(step * TILE::MMA_M + i) % ROWS], half);
      }
    }
  }
}

// 16 bytes into shared memory through registers, for what cp.async cannot gather.
template <class T>
CONVEXT_DEVICE void store_chunk(uint32_t destination, const Vector<T>& chunk) {
  uint4 raw;
  memcpy(&raw, &chunk, sizeof raw);
  ptx::store_shared_16(destination, raw);
}

// The ring of stages: where the next one is loaded, and which is read. They are STAGES - 1 apart.
template <class TILE>
struct Ring {
  uint32_t read, load, end;
  CONVEXT_DEVICE explicit Ring(uint32_t first)
      : read(first),
        load(first + (TILE::STAGES - 1) * TILE::STAGE_BYTES),
        end(first + TILE::STAGES * TILE::STAGE_BYTES) {}
  CONVEXT_DEVICE void advance() {
    load = read;
    read += TILE::STAGE_BYTES;
    if (read == end) read -= TILE::STAGES * TILE::STAGE_BYTES;
  }
};

}  // namespace convext::cuda

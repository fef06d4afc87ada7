// Each function of cuda/ptx/ in a kernel of one warp, for tests/cuda/test_ptx.py, which runs what nvcc makes of them.
// Every kernel stores all that its instructions give, so that a wrong operand shows.
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/global.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/mma.h"
#include "cuda/ptx/shared.h"

using namespace convext::cuda;

// out[i] = the chunk that lane i ^ 1 copied: in[i ^ 1], and zeros from lane `count` on.
extern "C" __global__ void copy(const uint4* in, uint4* out, int count) {
  CONVEXT_SHARED_MEMORY(shared);
  const int lane = threadIdx.x;
  const uint32_t base = ptx::shared_address(shared);
  ptx::cp_async_16(base + lane * 16, in + lane, lane < count);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  ptx::store_global_16(out + lane, ptx::load_shared_16(base + (lane ^ 1) * 16));
}

// Two groups: out[0] is of the older one and out[1] of the younger, when the older has been waited for; out[2] of the
// younger, when that has, too. (3, 32) chunks.
extern "C" __global__ void copy_groups(const uint4* in, uint4* out) {
  CONVEXT_SHARED_MEMORY(shared);
  const int lane = threadIdx.x;
  const uint32_t older = ptx::shared_address(shared) + lane * 16, younger = older + 32 * 16;
  ptx::cp_async_16(older, in + lane, true);
  ptx::cp_async_commit();
  ptx::cp_async_16(younger, in + 32 + lane, true);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  ptx::store_global_16(out + lane, ptx::load_shared_16(older));
  ptx::store_global_16(out + 32 + lane, ptx::load_shared_16(younger));
  ptx::cp_async_wait<0>();
  ptx::store_global_16(out + 64 + lane, ptx::load_shared_16(younger));
}

// Shared memory by chunks and by words: out[4 * lane + i] = word i of the chunk that lane stored.
extern "C" __global__ void words(const uint4* in, uint32_t* out) {
  CONVEXT_SHARED_MEMORY(shared);
  const int lane = threadIdx.x;
  const uint32_t base = ptx::shared_address(shared);
  ptx::store_shared_16(base + lane * 16, in[lane]);
  __syncwarp();
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = ptx::load_shared(base + lane * 16 + i * 4);
}

// By pairs of words: out[i] is the chunk that lane i ^ 1 stored.
extern "C" __global__ void pairs(const uint2* in, uint2* out) {
  CONVEXT_SHARED_MEMORY(shared);
  const int lane = threadIdx.x;
  const uint32_t base = ptx::shared_address(shared);
  for (int i = 0; i < 2; ++i) ptx::store_shared_8(base + lane * 16 + i * 8, in[2 * lane + i]);
  __syncwarp();
  for (int i = 0; i < 2; ++i) out[2 * lane + i] = ptx::load_shared_8(base + (lane ^ 1) * 16 + i * 8);
}

extern "C" __global__ void tf32(const uint32_t* in, uint32_t* out) {
  out[threadIdx.x] = ptx::round_to_tf32(in[threadIdx.x]);
}

__device__ void store_product(const float (&d)[4], float* out, int column) {
  const int group = threadIdx.x / 4, place = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i) out[(group + i / 2 * 8) * 16 + column + place * 2 + i % 2] = d[i];
}

// by_rows = by_columns = c + a b, all of them (16, 16). b comes as b's transpose, which ldmatrix reads as it is, and as
// b, which ldmatrix.trans turns.
template <class T>
__device__ void product(uint32_t base, const T* a, const T* b, const T* b_transposed, const float* c, float* by_rows,
                        float* by_columns) {
  const int lane = threadIdx.x;
  const T* const matrices[] = {a, b, b_transposed};
  for (int i = 0; i < 3; ++i) {
    ptx::store_shared_16(base + i * 512 + lane * 16, reinterpret_cast<const uint4*>(matrices[i])[lane]);
  }
  __syncwarp();
  uint32_t left[4], right[4];
  ptx::ldmatrix_x4(left, base + lane % 16 * 32 + lane / 16 * 16);
  for (int form = 0; form < 2; ++form) {
    if (form == 0) ptx::ldmatrix_x4(right, base + 1024 + (lane % 8 + lane / 16 * 8) * 32 + lane / 8 % 2 * 16);
    else ptx::ldmatrix_x4_trans(right, base + 512 + lane % 16 * 32 + lane / 16 * 16);
    for (int column = 0; column < 16; column += 8) {
      const uint32_t half[2] = {right[column / 4], right[column / 4 + 1]};
      float d[4];
      for (int i = 0; i < 4; ++i) d[i] = c[(lane / 4 + i / 2 * 8) * 16 + column + lane % 4 * 2 + i % 2];
      ptx::mma<T>(d, left, half);
      store_product(d, form == 0 ? by_rows : by_columns, column);
    }
  }
}

extern "C" __global__ void product_bf16(const bf16* a, const bf16* b, const bf16* b_transposed, const float* c,
                                        float* by_rows, float* by_columns) {
  CONVEXT_SHARED_MEMORY(shared);
  product(ptx::shared_address(shared), a, b, b_transposed, c, by_rows, by_columns);
}
extern "C" __global__ void product_f16(const fp16* a, const fp16* b, const fp16* b_transposed, const float* c,
                                       float* by_rows, float* by_columns) {
  CONVEXT_SHARED_MEMORY(shared);
  product(ptx::shared_address(shared), a, b, b_transposed, c, by_rows, by_columns);
}

// out = c + a b, of which a is (16, 8), b (8, 8), and both others are the first 8 columns of (16, 16).
extern "C" __global__ void product_tf32(const uint32_t* a, const uint32_t* b, const float* c, float* out) {
  const int group = threadIdx.x / 4, place = threadIdx.x % 4;
  uint32_t left[4], right[2];
  for (int i = 0; i < 4; ++i) left[i] = a[(group + i % 2 * 8) * 8 + place + i / 2 * 4];
  for (int i = 0; i < 2; ++i) right[i] = b[(place + i * 4) * 8 + group];
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = c[(group + i / 2 * 8) * 16 + place * 2 + i % 2];
  ptx::mma<float>(d, left, right);
  store_product(d, out, 0);
}

"""The weight gradient as implicit GEMM, for direct and dilated convolutions.

    dw[k,r,s,c] = sum_{n,p,q} dy[n,p,q,k] * x[n, p*stride_h - pad_h + r*dil_h, q*stride_w - pad_w + s*dil_w, c]

           A = dy^T (K, NPQ)      B = x gathered (NPQ, RSC)      C = dw (K, RSC)      per group

    one tap a tile                                          FLAT, few channels
           BLOCK_N channels of tap (r, s)                   BLOCK_N of the flattened (r, s, c)
          +---------+                                       +--------------------------+
          | B       |  BLOCK_K pixels at a time             | tap 0 | tap 1 | tap 2 |..|
    +---+ +---------+                                       +--------------------------+
    | A | |  acc    |  BLOCK_M filters
    +---+ +---------+

With one tap a tile, the pixels (p, q) for which the tap meets the image form a rectangle [p_lo, p_hi) x [q_lo, q_hi).
The loop visits that rectangle of every image and nothing else: dilated or not, no product with padding is formed, and
the loads need no mask for the border. FLAT tiles span taps and mask instead.

The reduction over N*P*Q pixels is long and the output small, so it is split over SPLIT_K programs a tile. Each writes
its partial sum to a slab of its own, and reduction.py adds the slabs in order: no atomics, the same bits every time.

Budget and configurations are those of direct.py.
"""

import triton
import triton.language as tl

from ..problem import Pass
from . import reduction
from .configs import tuning_key
from .direct import geometry, is_flat
from .launch import Launch, accumulate, gemm_choice, index_type, processors, strides
from .tile import multiply_accumulate


@triton.jit
def positions_inside(offset, STRIDE: tl.constexpr, extent, count):
    """[lo, hi) of the p in [0, count) with 0 <= p*STRIDE + offset < extent."""
    lo = tl.where(offset >= 0, 0, (-offset + STRIDE - 1) // STRIDE)
    hi = tl.where(offset >= extent, 0, (extent - offset + STRIDE - 1) // STRIDE)
    hi = tl.minimum(hi, count)
    return tl.minimum(lo, hi), hi


@triton.jit(do_not_specialize=["N", "H", "W", "P", "Q", "pad_h", "pad_w", "split_k", "tuning_key"])
def wgrad_kernel(
    dy_ptr,
    x_ptr,
    dw_ptr,
    N,
    H,
    W,
    C,
    P,
    Q,
    K,
    pad_h,
    pad_w,
    split_k,
    tuning_key,
    dy_stride_n,
    dy_stride_k,
    dy_stride_p,
    dy_stride_q,
    x_stride_n,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    dw_stride_split,
    dw_stride_k,
    dw_stride_c,
    dw_stride_r,
    dw_stride_s,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    FLAT: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """C and K count the channels of one group. dw is the gradient, or the slabs: (split_k, K, C, R, S)."""
    tiles_m = tl.cdiv(K, BLOCK_M)
    pid = tl.program_id(0)
    tile_m = pid % tiles_m
    rest = pid // tiles_m
    if FLAT:
        tiles_n = tl.cdiv(C * R * S, BLOCK_N)
        tile_n = rest % tiles_n
        rest = rest // tiles_n
    else:
        tiles_n = tl.cdiv(C, BLOCK_N)
        tile_n = rest % tiles_n
        tap = rest // tiles_n % (R * S)
        rest = rest // tiles_n // (R * S)
    split = rest % split_k
    group = (rest // split_k).to(INDEX)

    k = tile_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    k_ok = k < K
    col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if FLAT:
        c = (col % C).to(INDEX)
        r = col // C // S  # (BLOCK_N,)
        s = col // C % S
        col_ok = col < C * R * S
        p_lo, p_hi, q_lo, q_hi = 0, P, 0, Q
    else:
        c = col.to(INDEX)
        r = tap // S
        s = tap % S
        col_ok = col < C
        p_lo, p_hi = positions_inside(r * DIL_H - pad_h, STRIDE_H, H, P)
        q_lo, q_hi = positions_inside(s * DIL_W - pad_w, STRIDE_W, W, Q)
    rows = tl.maximum(p_hi - p_lo, 1)
    cols = tl.maximum(q_hi - q_lo, 1)
    pixels = tl.maximum(p_hi - p_lo, 0).to(INDEX) * tl.maximum(q_hi - q_lo, 0) * N
    blocks = tl.cdiv(tl.cdiv(pixels, split_k), BLOCK_K)  # of this program's share
    begin = split.to(INDEX) * blocks * BLOCK_K
    end = tl.minimum(begin + blocks * BLOCK_K, pixels)

    dy_row = dy_ptr + (group * K + k) * dy_stride_k  # (BLOCK_M,)
    x_col = x_ptr + (group * C + c) * x_stride_c  # (BLOCK_N,)
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for step in range(tl.cdiv(tl.maximum(end - begin, 0), BLOCK_K).to(tl.int32)):
        # Invariant: acc holds the sum over pixels [begin, begin + step*BLOCK_K).
        pixel = begin + step * BLOCK_K + tl.arange(0, BLOCK_K)  # (BLOCK_K,)
        ok = pixel < end
        q = q_lo + pixel % cols
        p = p_lo + pixel // cols % rows
        n = pixel // cols // rows
        dy = dy_row[:, None] + (n * dy_stride_n + p * dy_stride_p + q * dy_stride_q)[None, :]
        if FLAT:
            h = (p * STRIDE_H - pad_h)[:, None] + (r * DIL_H)[None, :]  # (BLOCK_K, BLOCK_N)
            w = (q * STRIDE_W - pad_w)[:, None] + (s * DIL_W)[None, :]
            x = x_col[None, :] + (n * x_stride_n)[:, None] + h * x_stride_h + w * x_stride_w
            inside = ok[:, None] & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        else:
            h = p * STRIDE_H - pad_h + r * DIL_H  # (BLOCK_K,)
            w = q * STRIDE_W - pad_w + s * DIL_W
            x = x_col[None, :] + (n * x_stride_n + h * x_stride_h + w * x_stride_w)[:, None]
            inside = ok[:, None]
        dy_tile = tl.load(dy, k_ok[:, None] & ok[None, :], 0)  # (BLOCK_M, BLOCK_K)
        x_tile = tl.load(x, inside & col_ok[None, :], 0)  # (BLOCK_K, BLOCK_N)
        acc = multiply_accumulate(dy_tile, x_tile, acc, PRECISION)

    filter_col = c * dw_stride_c + r * dw_stride_r + s * dw_stride_s
    dw = dw_ptr + split.to(INDEX) * dw_stride_split + ((group * K + k) * dw_stride_k)[:, None] + filter_col[None, :]
    tl.store(dw, acc.to(dw_ptr.dtype.element_ty), k_ok[:, None] & col_ok[None, :])


# Programs wanted on each multiprocessor before the reduction is split no further, pixels that a split is worth, and
# the most memory for slabs.
PROGRAMS_PER_PROCESSOR = 2
LEAST_PIXELS = 256
SLAB_BYTES = 1 << 28


def split_count(tiles: int, pixels: int, dw_bytes: int, processors: int) -> int:
    """Over how many programs to split the reduction of each tile."""
    wanted = -(-PROGRAMS_PER_PROCESSOR * processors // tiles)
    return max(1, min(wanted, pixels // LEAST_PIXELS, SLAB_BYTES // dw_bytes))


def wgrad(problem, dy, x, dw) -> list[Launch]:
    """dw, (K, C/groups, R, S) and contiguous, becomes wgrad(dy, x)."""
    m, n, k = problem.gemm_shape(Pass.WGRAD)
    flat = is_flat(problem, problem.c_per_group)
    batch = problem.groups if flat else problem.groups * problem.r * problem.s
    n = n if flat else problem.c_per_group
    configs, how = gemm_choice(dy.dtype, dy.device, m, n, k, batch, flat)

    def tiles(meta):
        return triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"]) * batch

    accumulator = problem.accumulate_dtype
    split_k = split_count(tiles(configs[0].kwargs), k, dw.numel() * accumulator.itemsize, processors(dy.device))
    slabs = dw[None] if split_k == 1 else dw.new_empty((split_k, *dw.shape), dtype=accumulator)
    launches = [
        Launch(
            wgrad_kernel,
            lambda meta: (tiles(meta) * split_k,),
            configs,
            {
                "dy_ptr": dy,
                "x_ptr": x,
                "dw_ptr": slabs,
                **geometry(problem),
                "split_k": split_k,
                "tuning_key": tuning_key(problem, m, n, k, split_k),
                **strides("dy", "nkpq", dy),
                **strides("x", "nchw", x),
                **{f"dw_stride_{axis}": stride for axis, stride in zip(("split", *"kcrs"), slabs.stride())},
                "FLAT": flat,
                "ACC": accumulate(dy.dtype),
                "PRECISION": how,
                "INDEX": index_type(dy, x, slabs),
            },
        )
    ]
    if split_k > 1:
        launches.append(reduction.add_slabs(slabs, dw))
    return launches

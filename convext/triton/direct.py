"""Direct convolution: fprop and dgrad as implicit GEMM. No im2col matrix is ever written: the A tile is gathered.

    fprop   y[n,p,q,k]  = sum_{r,s,c} x[n,h,w,c]  * w[k,r,s,c]      h = p*stride_h - pad_h + r*dil_h
    dgrad   dx[n,h,w,c] = sum_{r,s,k} dy[n,p,q,k] * w[k,r,s,c]      p = (h + pad_h - r*dil_h) / stride_h where whole

                 A, gathered             B, the filter       C
    fprop        x   (NPQ, RSC)          (RSC, K)            y   (NPQ, K)           per group
    dgrad        dy  (NHW, RSK)          (RSK, C)            dx  (NHW, C)           per group and residue class

A strided dgrad reaches each pixel through few taps: of a 3 x 3 filter at stride 2, one, two or four of nine, depending
on the parity of h and w. Pixels of one parity (one residue of h modulo stride_h) share their taps r0, r0 + step, ...,
and over those they are an ordinary unit-stride convolution. So the grid holds stride_h * stride_w residue classes, and
no product with a structural zero is ever formed. Both passes are then one gather along each axis,

    input(i, t) = in_first + in_step*i + in_tap_step*t        filter row(t) = tap_first + tap_step*t

              in_first                          in_step   in_tap_step             tap_first   tap_step
    fprop     -pad                              stride    dil                     0           1
    dgrad     (a + pad - tap_first*dil)/stride  1         -tap_step*dil/stride    r0          stride / gcd(stride, dil)

for pixel h = out_first + out_step*i = a + stride*i of class a: the map of the compiled kernels (csrc/core/axis.h).
Below, in_first is base_*, in_tap_step STEP_*, tap_first r0 or s0, tap_step R_STEP or S_STEP. One loop, `gather_gemm`:

            BLOCK_N filters                      The loop walks taps, and channels within a tap, BLOCK_K at a time.
           +-----------+                         With few channels (the stem's 3) a tap would leave most of BLOCK_K
           |  B (K,N)  |  for every BLOCK_K      idle: FLAT walks the flattened (tap, channel) axis instead, 147
           +-----------+  of (r, s, c)           steps for a 7 x 7 stem, not 49 * 16.
    +----+ +-----------+
    | A  | |    acc    |  BLOCK_M pixels         Pixels beyond the image read as 0 through the load's mask; with
    +----+ +-----------+                         patches (dilated.py) taps that only meet padding are not visited.

Budget, 16-bit, 128 x 128 x 64 in 3 stages: 3*(128+128)*64*2 B = 96 KiB of shared memory, 128*128*4 B = 64 KiB of
accumulators, 128 registers a thread at 128 threads, 64 at 256. FLOP per byte moved into the tile:
2*128*128*64 / ((128+128)*64*2) = 64. configs.py argues the other tiles.

A layer of few pixels and a long reduction (7 x 7 pixels, 512 channels, 3 x 3: 8 tiles of 72 steps, for 132
multiprocessors) leaves most of the GPU idle. There the loop is split over SPLIT_K programs a tile (`split_count`); each
writes its partial sum to a slab of its own, and a second kernel adds the slabs in order and, in fprop, applies the
epilogue: no atomics, the same bits every time.

Chosen for every convolution that depthwise.py does not take.
"""

import math

import torch
import triton
import triton.language as tl

from ..problem import Epilogue, Layout, Pass
from . import dilated, reduction
from .configs import tuning_key
from .dilated import taps_that_reach
from .epilogue import finish_tile
from .launch import Launch, accumulate, gemm_choice, index_type, power_of_2_at_least, processors, strides
from .tile import multiply_accumulate, patch_origin, patch_shape, tile_count, tile_pixels

# Below so many channels of a group, the loop walks the flattened (tap, channel) axis.
FEW_CHANNELS = 32
# The largest patch of NCHW pixels.
PATCH_P, PATCH_Q = 64, 64


@triton.jit
def gather_gemm(
    a_ptr,
    a_stride_n,
    a_stride_h,
    a_stride_w,
    a_stride_c,
    b_ptr,
    b_stride_r,
    b_stride_s,
    b_stride_c,
    b_stride_col,
    n,
    h0,
    w0,
    pixel_ok,
    H,
    W,
    C,
    col,
    col_ok,
    r_lo,
    r_hi,
    first_r,
    R_STEP: tl.constexpr,
    STEP_H: tl.constexpr,
    s_lo,
    s_hi,
    first_s,
    S_STEP: tl.constexpr,
    STEP_W: tl.constexpr,
    split,
    split_k,
    FLAT: tl.constexpr,
    SPLIT: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc[m, j] = sum over taps (r, s) in [r_lo, r_hi) x [s_lo, s_hi) and channels c of

        a[n_m, h0_m + r*STEP_H, w0_m + s*STEP_W, c] * b[first_r + r*R_STEP, first_s + s*S_STEP, c, col_j]

    or, with SPLIT, over part `split` of split_k of them."""
    lane = tl.arange(0, BLOCK_K)
    taps_s = tl.maximum(s_hi - s_lo, 1)
    taps = tl.maximum(r_hi - r_lo, 0) * tl.maximum(s_hi - s_lo, 0)
    a_row = a_ptr + n * a_stride_n  # (BLOCK_M,)
    b_col = b_ptr + col * b_stride_col  # (BLOCK_N,)
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    blocks_c = tl.cdiv(C, BLOCK_K)
    if FLAT:
        steps = tl.cdiv(taps * C, BLOCK_K)
    else:
        steps = taps * blocks_c
    begin = 0
    if SPLIT:
        share = tl.cdiv(steps, split_k)
        begin = split * share
        steps = tl.minimum(begin + share, steps)
    for step in range(begin, steps):
        # Invariant: acc holds the sum over entries [begin*BLOCK_K, step*BLOCK_K) of the (tap, channel) axis.
        if FLAT:
            entry = step * BLOCK_K + lane  # (BLOCK_K,)
            c = entry % C
            tap = entry // C
            c_ok = tap < taps
            r = r_lo + tap // taps_s
            s = s_lo + tap % taps_s
            h = h0[:, None] + (r * STEP_H)[None, :]  # (BLOCK_M, BLOCK_K)
            w = w0[:, None] + (s * STEP_W)[None, :]
            a = a_row[:, None] + h * a_stride_h + w * a_stride_w + (c * a_stride_c)[None, :]
            inside = pixel_ok[:, None] & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            b = (first_r + r * R_STEP) * b_stride_r + (first_s + s * S_STEP) * b_stride_s + c * b_stride_c
        else:
            c = step % blocks_c * BLOCK_K + lane  # (BLOCK_K,)
            tap = step // blocks_c
            c_ok = c < C
            r = r_lo + tap // taps_s
            s = s_lo + tap % taps_s
            h = h0 + r * STEP_H  # (BLOCK_M,)
            w = w0 + s * STEP_W
            a = (a_row + h * a_stride_h + w * a_stride_w)[:, None] + (c * a_stride_c)[None, :]
            inside = (pixel_ok & (h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None]
            b = (first_r + r * R_STEP) * b_stride_r + (first_s + s * S_STEP) * b_stride_s + c * b_stride_c
        a_tile = tl.load(a, inside & c_ok[None, :], 0)  # (BLOCK_M, BLOCK_K)
        b_tile = tl.load(b_col[None, :] + b[:, None], c_ok[:, None] & col_ok[None, :], 0)  # (BLOCK_K, BLOCK_N)
        acc = multiply_accumulate(a_tile, b_tile, acc, PRECISION)
    return acc


@triton.jit
def patch_taps(
    tile,
    P,
    Q,
    SCALE_H: tl.constexpr,
    SCALE_W: tl.constexpr,
    base_h,
    base_w,
    STEP_H: tl.constexpr,
    STEP_W: tl.constexpr,
    H,
    W,
    R,
    S,
    BLOCK_M: tl.constexpr,
    PATCH_P: tl.constexpr,
    PATCH_Q: tl.constexpr,
):
    """The taps that a patch needs: r_lo, r_hi, s_lo, s_hi. P, Q: the tiled grid; H, W: the gathered image."""
    SHAPE: tl.constexpr = patch_shape(BLOCK_M, PATCH_P, PATCH_Q)
    p0, q0 = patch_origin(tile, P, Q, BLOCK_M, PATCH_P, PATCH_Q)
    p1 = tl.minimum(p0 + SHAPE[1], P) - 1
    q1 = tl.minimum(q0 + SHAPE[2], Q) - 1
    r_lo, r_hi = taps_that_reach(p0 * SCALE_H + base_h, p1 * SCALE_H + base_h, STEP_H, H, R)
    s_lo, s_hi = taps_that_reach(q0 * SCALE_W + base_w, q1 * SCALE_W + base_w, STEP_W, W, S)
    return r_lo, r_hi, s_lo, s_hi


@triton.jit(do_not_specialize=["N", "H", "W", "P", "Q", "pad_h", "pad_w", "split_k", "tuning_key"])
def fprop_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    gamma_ptr,
    beta_ptr,
    residual_ptr,
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
    x_stride_n,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    w_stride_k,
    w_stride_c,
    w_stride_r,
    w_stride_s,
    y_stride_split,
    y_stride_n,
    y_stride_k,
    y_stride_p,
    y_stride_q,
    z_stride_n,
    z_stride_k,
    z_stride_p,
    z_stride_q,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    EPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GROUPS: tl.constexpr,
    FLAT: tl.constexpr,
    SKIP: tl.constexpr,
    SPLIT: tl.constexpr,
    PATCH_P: tl.constexpr,
    PATCH_Q: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """C and K count the channels of one group. y is the result, or with SPLIT the slabs, (split_k, *y). z is the
    residual. A program is one tile; the filters and groups of one tile of pixels are neighbours, so that the gathered
    pixels are still in cache."""
    tiles_n = tl.cdiv(K, BLOCK_N)
    pid = tl.program_id(0)
    tile_n = pid % tiles_n
    rest = pid // tiles_n
    split = 0
    if SPLIT:
        split = rest % split_k
        rest = rest // split_k
    group = (rest % GROUPS).to(INDEX)
    tile_m = rest // GROUPS

    n, p, q, pixel_ok = tile_pixels(tile_m, N, P, Q, BLOCK_M, PATCH_P, PATCH_Q, INDEX)
    k = tile_n.to(INDEX) * BLOCK_N + tl.arange(0, BLOCK_N)
    k_ok = k < K
    r_lo, r_hi, s_lo, s_hi = 0, R, 0, S
    if SKIP:
        r_lo, r_hi, s_lo, s_hi = patch_taps(
            tile_m, P, Q, STRIDE_H, STRIDE_W, -pad_h, -pad_w, DIL_H, DIL_W, H, W, R, S, BLOCK_M, PATCH_P, PATCH_Q
        )
    acc = gather_gemm(
        x_ptr + group * C * x_stride_c,
        x_stride_n,
        x_stride_h,
        x_stride_w,
        x_stride_c,
        w_ptr + group * K * w_stride_k,
        w_stride_r,
        w_stride_s,
        w_stride_c,
        w_stride_k,
        n,
        p * STRIDE_H - pad_h,
        q * STRIDE_W - pad_w,
        pixel_ok,
        H,
        W,
        C,
        k,
        k_ok,
        r_lo,
        r_hi,
        0,
        1,
        DIL_H,
        s_lo,
        s_hi,
        0,
        1,
        DIL_W,
        split,
        split_k,
        FLAT,
        SPLIT,
        ACC,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )

    if SPLIT:
        y_ptr += (pid // tiles_n % split_k).to(INDEX) * y_stride_split  # `split` again: the loop is short of registers
    finish_tile(
        acc,
        n,
        p,
        q,
        pixel_ok,
        group * K + k,
        k_ok,
        y_ptr,
        y_stride_n,
        y_stride_k,
        y_stride_p,
        y_stride_q,
        residual_ptr,
        z_stride_n,
        z_stride_k,
        z_stride_p,
        z_stride_q,
        bias_ptr,
        mean_ptr,
        var_ptr,
        gamma_ptr,
        beta_ptr,
        EPS,
        ACTIVATION,
        ACC,
    )


@triton.jit(do_not_specialize=["N", "P", "Q", "split_k"])
def finish_kernel(
    slab_ptr,
    y_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    gamma_ptr,
    beta_ptr,
    residual_ptr,
    N,
    P,
    Q,
    K,
    split_k,
    slab_stride_split,
    y_stride_n,
    y_stride_k,
    y_stride_p,
    y_stride_q,
    z_stride_n,
    z_stride_k,
    z_stride_p,
    z_stride_q,
    EPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds the slabs of a split fprop in order, applies the epilogue and writes y, which lies in memory as each slab
    does. K counts all channels."""
    tiles_n = tl.cdiv(K, BLOCK_N)
    pid = tl.program_id(0)
    n, p, q, pixel_ok = tile_pixels(pid // tiles_n, N, P, Q, BLOCK_M, 0, 0, INDEX)
    k = (pid % tiles_n).to(INDEX) * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = pixel_ok[:, None] & (k < K)[None, :]
    at = (n * y_stride_n + p * y_stride_p + q * y_stride_q)[:, None] + (k * y_stride_k)[None, :]
    slab = slab_ptr + at
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for _ in range(split_k):
        # Invariant: acc holds the sum of the slabs before `slab`.
        acc += tl.load(slab, ok, 0)
        slab += slab_stride_split
    finish_tile(
        acc,
        n,
        p,
        q,
        pixel_ok,
        k,
        k < K,
        y_ptr,
        y_stride_n,
        y_stride_k,
        y_stride_p,
        y_stride_q,
        residual_ptr,
        z_stride_n,
        z_stride_k,
        z_stride_p,
        z_stride_q,
        bias_ptr,
        mean_ptr,
        var_ptr,
        gamma_ptr,
        beta_ptr,
        EPS,
        ACTIVATION,
        ACC,
    )


@triton.jit
def first_tap(residue, STRIDE: tl.constexpr, DIL: tl.constexpr, COUNT: tl.constexpr):
    """The smallest r with r*DIL = residue modulo STRIDE; COUNT where there is none."""
    r0 = COUNT + residue * 0
    for i in tl.static_range(STRIDE):
        r = STRIDE - 1 - i
        r0 = tl.where(r * DIL % STRIDE == residue, r, r0)
    return tl.minimum(r0, COUNT)


@triton.jit(do_not_specialize=["N", "H", "W", "P", "Q", "pad_h", "pad_w", "split_k", "tuning_key"])
def dgrad_kernel(
    dy_ptr,
    w_ptr,
    dx_ptr,
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
    w_stride_k,
    w_stride_c,
    w_stride_r,
    w_stride_s,
    dx_stride_split,
    dx_stride_n,
    dx_stride_c,
    dx_stride_h,
    dx_stride_w,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    R_STEP: tl.constexpr,
    S_STEP: tl.constexpr,
    GROUPS: tl.constexpr,
    FLAT: tl.constexpr,
    SKIP: tl.constexpr,
    SPLIT: tl.constexpr,
    PATCH_P: tl.constexpr,
    PATCH_Q: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """C and K count the channels of one group; R_STEP = STRIDE_H / gcd(STRIDE_H, DIL_H). dx is the result, or with
    SPLIT the slabs, (split_k, *dx). A program is one tile of one residue class; pixel (i, j) of class (a, b) is
    (h, w) = (a + i*STRIDE_H, b + j*STRIDE_W)."""
    tiles_n = tl.cdiv(C, BLOCK_N)
    pid = tl.program_id(0)
    tile_n = pid % tiles_n
    rest = pid // tiles_n
    split = 0
    if SPLIT:
        split = rest % split_k
        rest = rest // split_k
    b = rest % STRIDE_W
    a = rest // STRIDE_W % STRIDE_H
    rest = rest // (STRIDE_H * STRIDE_W)
    group = (rest % GROUPS).to(INDEX)
    tile_m = rest // GROUPS

    r0 = first_tap((a + pad_h) % STRIDE_H, STRIDE_H, DIL_H, R)
    s0 = first_tap((b + pad_w) % STRIDE_W, STRIDE_W, DIL_W, S)
    base_h = (a + pad_h - r0 * DIL_H) // STRIDE_H  # a whole number wherever there is a tap
    base_w = (b + pad_w - s0 * DIL_W) // STRIDE_W
    STEP_H: tl.constexpr = -(R_STEP * DIL_H // STRIDE_H)
    STEP_W: tl.constexpr = -(S_STEP * DIL_W // STRIDE_W)
    rows = tl.cdiv(H, STRIDE_H)
    cols = tl.cdiv(W, STRIDE_W)

    n, i, j, pixel_ok = tile_pixels(tile_m, N, rows, cols, BLOCK_M, PATCH_P, PATCH_Q, INDEX)
    h = a + i * STRIDE_H
    w = b + j * STRIDE_W
    pixel_ok = pixel_ok & (h < H) & (w < W)
    c = tile_n.to(INDEX) * BLOCK_N + tl.arange(0, BLOCK_N)
    c_ok = c < C
    r_lo, s_lo = 0, 0
    r_hi = tl.cdiv(R - r0, R_STEP)
    s_hi = tl.cdiv(S - s0, S_STEP)
    if SKIP:
        r_lo, r_hi, s_lo, s_hi = patch_taps(
            tile_m, rows, cols, 1, 1, base_h, base_w, STEP_H, STEP_W, P, Q, r_hi, s_hi, BLOCK_M, PATCH_P, PATCH_Q
        )
    acc = gather_gemm(
        dy_ptr + group * K * dy_stride_k,
        dy_stride_n,
        dy_stride_p,
        dy_stride_q,
        dy_stride_k,
        w_ptr + group * K * w_stride_k,
        w_stride_r,
        w_stride_s,
        w_stride_k,
        w_stride_c,
        n,
        i + base_h,
        j + base_w,
        pixel_ok,
        P,
        Q,
        K,
        c,
        c_ok,
        r_lo,
        r_hi,
        r0,
        R_STEP,
        STEP_H,
        s_lo,
        s_hi,
        s0,
        S_STEP,
        STEP_W,
        split,
        split_k,
        FLAT,
        SPLIT,
        ACC,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )

    if SPLIT:
        dx_ptr += (pid // tiles_n % split_k).to(INDEX) * dx_stride_split  # `split` again, as above
    dx = (
        dx_ptr
        + (n * dx_stride_n + h * dx_stride_h + w * dx_stride_w)[:, None]
        + ((group * C + c) * dx_stride_c)[None, :]
    )
    tl.store(dx, acc.to(dx_ptr.dtype.element_ty), pixel_ok[:, None] & c_ok[None, :])


def packed_filter(w):
    """The filter with its channels side by side (KRSC) where a tap is more than one element apart from the next."""
    return w if w.shape[2] * w.shape[3] == 1 else w.contiguous(memory_format=torch.channels_last)


def is_flat(problem, channels: int) -> bool:
    """Whether taps of so many channels are walked flattened."""
    return problem.r * problem.s > 1 and channels < FEW_CHANNELS


def patches(problem, nhwc: bool, columns: int) -> dict:
    """How tiles lie over a grid of so many columns: flat for channels-last memory, patches for NCHW and where taps can
    be skipped."""
    if problem.is_dilated:
        return {"PATCH_P": dilated.PATCH_P, "PATCH_Q": dilated.PATCH_Q}
    if nhwc:
        return {"PATCH_P": 0, "PATCH_Q": 0}
    return {"PATCH_P": PATCH_P, "PATCH_Q": min(power_of_2_at_least(columns), PATCH_Q)}


def geometry(problem) -> dict:
    """The sizes, channels of one group, and the filter's walk, by the kernels' names."""
    return {
        "N": problem.n,
        "H": problem.h,
        "W": problem.w,
        "C": problem.c_per_group,
        "P": problem.p,
        "Q": problem.q,
        "K": problem.k_per_group,
        "pad_h": problem.pad_h,
        "pad_w": problem.pad_w,
        "R": problem.r,
        "S": problem.s,
        "STRIDE_H": problem.stride_h,
        "STRIDE_W": problem.stride_w,
        "DIL_H": problem.dil_h,
        "DIL_W": problem.dil_w,
    }


def residue_classes(problem) -> tuple[dict, int, int]:
    """What splits dgrad: the distances R_STEP and S_STEP between the taps of a class, and a class's rows, columns."""
    steps = {
        "R_STEP": problem.stride_h // math.gcd(problem.stride_h, problem.dil_h),
        "S_STEP": problem.stride_w // math.gcd(problem.stride_w, problem.dil_w),
    }
    return steps, -(-problem.h // problem.stride_h), -(-problem.w // problem.stride_w)


def epilogue_arguments(epilogue) -> dict:
    return {
        "bias_ptr": epilogue.bias,
        "mean_ptr": epilogue.mean,
        "var_ptr": epilogue.var,
        "gamma_ptr": epilogue.gamma,
        "beta_ptr": epilogue.beta,
        "residual_ptr": epilogue.residual,
        "EPS": epilogue.eps,
        "ACTIVATION": epilogue.activation,
        **strides("z", "nkpq", epilogue.residual),
    }


# A split is worth it for so many steps of the loop, and slabs for so much memory at the most.
LEAST_STEPS = 4
SLAB_BYTES = 1 << 26


def split_count(tiles: int, steps: int, result_bytes: int, processors: int) -> int:
    """Over how many programs to split the loop of each tile: as many as keep all multiprocessors at work at once. One
    where they are busy anyway: slabs cost memory traffic and another launch."""
    return max(1, min(processors // tiles, steps // LEAST_STEPS, SLAB_BYTES // result_bytes))


def slabs_like(t, count: int, dtype: torch.dtype):
    """`count` tensors laid out as the dense tensor t, one after the other."""
    return torch.empty_strided((count, *t.shape), (t.numel(), *t.stride()), dtype=dtype, device=t.device)


def steps_of(config, gemm_k: int) -> int:
    """Steps of the loop where no tap is skipped."""
    return triton.cdiv(gemm_k, config.kwargs["BLOCK_K"])


def fprop(problem, x, w, epilogue, y) -> list[Launch]:
    """y, of problem.y_shape and any dense strides, becomes fprop(x, w) with the epilogue applied."""
    m, n, k = problem.gemm_shape(Pass.FPROP)
    flat = is_flat(problem, problem.c_per_group)
    configs, how = gemm_choice(x.dtype, x.device, m, n, k, problem.groups, flat)
    w = packed_filter(w)
    patch = patches(problem, problem.x_layout == Layout.NHWC, problem.q)

    def tiles(meta):
        tiles_m = tile_count(meta["BLOCK_M"], patch["PATCH_P"], patch["PATCH_Q"], problem.n, problem.p, problem.q)
        return tiles_m * problem.groups * triton.cdiv(n, meta["BLOCK_N"])

    accumulator = problem.accumulate_dtype
    split_k = split_count(
        tiles(configs[0].kwargs), steps_of(configs[0], k), y.numel() * accumulator.itemsize, processors(x.device)
    )
    split = split_k > 1
    slabs = slabs_like(y, split_k, accumulator) if split else y
    common = {"ACC": accumulate(x.dtype), "INDEX": index_type(x, w, slabs, epilogue.residual)}
    launches = [
        Launch(
            fprop_kernel,
            lambda meta: (tiles(meta) * split_k,),
            configs,
            {
                "x_ptr": x,
                "w_ptr": w,
                "y_ptr": slabs,
                **geometry(problem),
                **patch,
                **common,
                **epilogue_arguments(Epilogue() if split else epilogue),
                **strides("x", "nchw", x),
                **strides("w", "kcrs", w),
                **strides("y", "nkpq", y),
                "y_stride_split": split * y.numel(),
                "split_k": split_k,
                "tuning_key": tuning_key(problem, m, n, k, split_k),
                "GROUPS": problem.groups,
                "FLAT": flat,
                "SKIP": problem.is_dilated,
                "SPLIT": split,
                "PRECISION": how,
            },
        )
    ]
    if split:
        blocks = triton.cdiv(m, FINISH["BLOCK_M"]) * triton.cdiv(problem.k, FINISH["BLOCK_N"])
        launches.append(
            Launch(
                finish_kernel,
                lambda meta: (blocks,),
                (triton.Config(FINISH, num_warps=4),),
                {
                    "slab_ptr": slabs,
                    "y_ptr": y,
                    **epilogue_arguments(epilogue),
                    **common,
                    "N": problem.n,
                    "P": problem.p,
                    "Q": problem.q,
                    "K": problem.k,
                    "split_k": split_k,
                    "slab_stride_split": y.numel(),
                    **strides("y", "nkpq", y),
                },
            )
        )
    return launches


# The tile of finish_kernel: eight elements a thread of four warps, small because the layers are.
FINISH = {"BLOCK_M": 16, "BLOCK_N": 64}


def dgrad(problem, dy, w, dx) -> list[Launch]:
    """dx, of problem.x_shape and any dense strides, becomes dgrad(dy, w)."""
    m, n, k = problem.gemm_shape(Pass.DGRAD)
    classes = problem.stride_h * problem.stride_w
    flat = is_flat(problem, problem.k_per_group)
    configs, how = gemm_choice(
        dy.dtype, dy.device, -(-m // classes), n, -(-k // classes), problem.groups * classes, flat
    )
    w = packed_filter(w)
    steps, rows, columns = residue_classes(problem)
    patch = patches(problem, problem.y_layout == Layout.NHWC, columns)

    def tiles(meta):
        tiles_m = tile_count(meta["BLOCK_M"], patch["PATCH_P"], patch["PATCH_Q"], problem.n, rows, columns)
        return tiles_m * problem.groups * classes * triton.cdiv(n, meta["BLOCK_N"])

    accumulator = problem.accumulate_dtype
    split_k = split_count(
        tiles(configs[0].kwargs),
        steps_of(configs[0], -(-k // classes)),
        dx.numel() * accumulator.itemsize,
        processors(dy.device),
    )
    split = split_k > 1
    slabs = slabs_like(dx, split_k, accumulator) if split else dx
    launches = [
        Launch(
            dgrad_kernel,
            lambda meta: (tiles(meta) * split_k,),
            configs,
            {
                "dy_ptr": dy,
                "w_ptr": w,
                "dx_ptr": slabs,
                **geometry(problem),
                **steps,
                **patch,
                **strides("dy", "nkpq", dy),
                **strides("w", "kcrs", w),
                **strides("dx", "nchw", dx),
                "dx_stride_split": split * dx.numel(),
                "split_k": split_k,
                "tuning_key": tuning_key(problem, m, n, k, split_k),
                "GROUPS": problem.groups,
                "FLAT": flat,
                "SKIP": problem.is_dilated,
                "SPLIT": split,
                "ACC": accumulate(dy.dtype),
                "PRECISION": how,
                "INDEX": index_type(dy, w, slabs),
            },
        )
    ]
    if split:
        launches.append(reduction.add_slabs(slabs, dx))
    return launches

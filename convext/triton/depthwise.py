"""Depthwise convolution: one filter (or `MULT` of them) a channel, groups == C.

    fprop   y[n,p,q,k]  = sum_{r,s} x[n,h,w,c]  * w[k,r,s]         c = k // MULT, h = p*stride_h - pad_h + r*dil_h
    dgrad   dx[n,h,w,c] = sum_{k of c} sum_{r,s} dy[n,p,q,k] * w[k,r,s]
    wgrad   dw[k,r,s]   = sum_{n,h,w} dy[n,p,q,k] * x[n,h,w,c]

No matrix here: 2*R*S operations an element, 18 for 3 x 3, against 4 bytes moved (16-bit): memory is the limit, and a
tile is a patch of pixels by a run of channels, whose R*S reads of each input stay in the first-level cache.

        channels ->                       NHWC   32..64 channels side by side, patches 8 pixels wide
      +------------+ pixels               NCHW   patches up to 64 pixels wide, several channels of a small image:
      |            |   |                         what is contiguous in memory is the fast axis of the tile
      +------------+   v

The backward pass is one pass: a program holds a tile of x and reads, tap by tap, the dy that the tap connects to it.
The same dy value, while in registers, serves dx[h,w] += dy * w[r,s] and dw[r,s] += dy * x[h,w]: three passes over
tensors (x, dy, dx), where separate kernels make four. Partial sums of dw go to one slab a tile and are added in order
(reduction.py): R*S floats a tile of 128 pixels and more, 9/128 of x for 3 x 3. Strides split the pixels into residue
classes as in direct.py, each with its own taps, so nothing is multiplied with a structural zero; every tap belongs to
one class, so the classes share a slab without meeting.

Filters up to 5 x 5 are unrolled; larger ones loop, and so do dilated ones, which skip taps that meet padding only.
"""

import triton
import triton.language as tl

from ..problem import Layout
from . import reduction
from .direct import epilogue_arguments, first_tap, geometry, patch_taps, residue_classes
from .epilogue import finish_tile
from .launch import Launch, accumulate, index_type, power_of_2_at_least, strides
from .tile import tile_count, tile_pixels

# Elements of a tile, over 8 warps: 8 registers a thread forward, 16 for each of x, dy and dx backward.
FPROP_TILE, BACKWARD_TILE = 2048, 4096
LARGEST_UNROLLED = 25


@triton.jit
def add_tap(
    acc,
    r,
    s,
    x_row,
    x_stride_h,
    x_stride_w,
    h0,
    w0,
    H,
    W,
    pixel_ok,
    channel_ok,
    w_col,
    w_stride_r,
    w_stride_s,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    ACC: tl.constexpr,
):
    h = h0 + r * DIL_H
    w = w0 + s * DIL_W
    inside = pixel_ok & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    x = tl.load(x_row + (h * x_stride_h + w * x_stride_w)[:, None], inside[:, None] & channel_ok[None, :], 0)
    f = tl.load(w_col + r * w_stride_r + s * w_stride_s, channel_ok, 0)
    return acc + x.to(ACC) * f.to(ACC)[None, :]


@triton.jit(do_not_specialize=["N", "H", "W", "P", "Q", "pad_h", "pad_w"])
def depthwise_fprop_kernel(
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
    P,
    Q,
    K,
    pad_h,
    pad_w,
    x_stride_n,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    w_stride_k,
    w_stride_r,
    w_stride_s,
    y_stride_n,
    y_stride_k,
    y_stride_p,
    y_stride_q,
    z_stride_n,
    z_stride_k,
    z_stride_p,
    z_stride_q,
    MULT: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    EPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    UNROLL: tl.constexpr,
    PATCH_P: tl.constexpr,
    PATCH_Q: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """K counts all output channels, C * MULT."""
    tiles_c = tl.cdiv(K, BLOCK_C)
    pid = tl.program_id(0)
    tile_m = pid // tiles_c
    n, p, q, pixel_ok = tile_pixels(tile_m, N, P, Q, BLOCK_M, PATCH_P, PATCH_Q, INDEX)
    k = (pid % tiles_c).to(INDEX) * BLOCK_C + tl.arange(0, BLOCK_C)
    k_ok = k < K
    h0 = p * STRIDE_H - pad_h
    w0 = q * STRIDE_W - pad_w
    x_row = x_ptr + (n * x_stride_n)[:, None] + (k // MULT * x_stride_c)[None, :]  # (BLOCK_M, BLOCK_C)
    w_col = w_ptr + k * w_stride_k  # (BLOCK_C,)
    acc = tl.zeros((BLOCK_M, BLOCK_C), ACC)
    if UNROLL:
        for tap in tl.static_range(R * S):
            acc = add_tap(
                acc,
                tap // S,
                tap % S,
                x_row,
                x_stride_h,
                x_stride_w,
                h0,
                w0,
                H,
                W,
                pixel_ok,
                k_ok,
                w_col,
                w_stride_r,
                w_stride_s,
                DIL_H,
                DIL_W,
                ACC,
            )
    else:
        r_lo, r_hi, s_lo, s_hi = patch_taps(
            tile_m, P, Q, STRIDE_H, STRIDE_W, -pad_h, -pad_w, DIL_H, DIL_W, H, W, R, S, BLOCK_M, PATCH_P, PATCH_Q
        )
        for r in range(r_lo, r_hi):
            for s in range(s_lo, s_hi):
                acc = add_tap(
                    acc,
                    r,
                    s,
                    x_row,
                    x_stride_h,
                    x_stride_w,
                    h0,
                    w0,
                    H,
                    W,
                    pixel_ok,
                    k_ok,
                    w_col,
                    w_stride_r,
                    w_stride_s,
                    DIL_H,
                    DIL_W,
                    ACC,
                )
    finish_tile(
        acc,
        n,
        p,
        q,
        pixel_ok,
        k,
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


@triton.jit
def add_tap_backward(
    dx,
    x,
    r,
    s,
    p,
    q,
    n,
    P,
    Q,
    pixel_ok,
    c,
    c_ok,
    dy_ptr,
    dy_stride_n,
    dy_stride_k,
    dy_stride_p,
    dy_stride_q,
    w_ptr,
    w_stride_k,
    w_stride_r,
    w_stride_s,
    slab_ptr,
    S: tl.constexpr,
    TAPS: tl.constexpr,
    MULT: tl.constexpr,
    NEED_DX: tl.constexpr,
    NEED_DW: tl.constexpr,
    ACC: tl.constexpr,
):
    """What tap (r, s), which leads from the tile's pixels to (p, q), adds to dx; its part of dw goes to the slab."""
    inside = (pixel_ok & (p >= 0) & (p < P) & (q >= 0) & (q < Q))[:, None] & c_ok[None, :]
    at = dy_ptr + (n * dy_stride_n + p * dy_stride_p + q * dy_stride_q)[:, None]
    for j in tl.static_range(MULT):
        k = c * MULT + j
        dy = tl.load(at + (k * dy_stride_k)[None, :], inside, 0).to(ACC)
        if NEED_DX:
            f = tl.load(w_ptr + k * w_stride_k + r * w_stride_r + s * w_stride_s, c_ok, 0)
            dx += dy * f.to(ACC)[None, :]
        if NEED_DW:
            # `where`, for an infinite x next to no dy is no NaN.
            dw = tl.sum(tl.where(inside, dy * x, 0.0), axis=0)
            tl.store(slab_ptr + k * TAPS + r * S + s, dw, c_ok)
    return dx


@triton.jit(do_not_specialize=["N", "H", "W", "P", "Q", "pad_h", "pad_w"])
def depthwise_backward_kernel(
    dy_ptr,
    x_ptr,
    w_ptr,
    dx_ptr,
    slab_ptr,
    N,
    H,
    W,
    C,
    P,
    Q,
    pad_h,
    pad_w,
    dy_stride_n,
    dy_stride_k,
    dy_stride_p,
    dy_stride_q,
    x_stride_n,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    w_stride_k,
    w_stride_r,
    w_stride_s,
    dx_stride_n,
    dx_stride_c,
    dx_stride_h,
    dx_stride_w,
    slab_stride,
    MULT: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    R_STEP: tl.constexpr,
    S_STEP: tl.constexpr,
    UNROLL: tl.constexpr,
    PATCH_P: tl.constexpr,
    PATCH_Q: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx where dx_ptr is given (it needs w), slabs (tiles, C * MULT, R, S) of dw where slab_ptr is (it needs x)."""
    NEED_DX: tl.constexpr = dx_ptr is not None
    NEED_DW: tl.constexpr = slab_ptr is not None
    tiles_c = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    b = pid // tiles_c % STRIDE_W
    a = pid // tiles_c // STRIDE_W % STRIDE_H
    tile_m = pid // tiles_c // (STRIDE_H * STRIDE_W)

    r0 = first_tap((a + pad_h) % STRIDE_H, STRIDE_H, DIL_H, R)
    s0 = first_tap((b + pad_w) % STRIDE_W, STRIDE_W, DIL_W, S)
    base_h = (a + pad_h - r0 * DIL_H) // STRIDE_H
    base_w = (b + pad_w - s0 * DIL_W) // STRIDE_W
    STEP_H: tl.constexpr = -(R_STEP * DIL_H // STRIDE_H)
    STEP_W: tl.constexpr = -(S_STEP * DIL_W // STRIDE_W)
    rows = tl.cdiv(H, STRIDE_H)
    cols = tl.cdiv(W, STRIDE_W)

    n, i, j, pixel_ok = tile_pixels(tile_m, N, rows, cols, BLOCK_M, PATCH_P, PATCH_Q, INDEX)
    h = a + i * STRIDE_H
    w = b + j * STRIDE_W
    pixel_ok = pixel_ok & (h < H) & (w < W)
    c = (pid % tiles_c).to(INDEX) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    ok = pixel_ok[:, None] & c_ok[None, :]
    dx = tl.zeros((BLOCK_M, BLOCK_C), ACC)
    x = dx
    if NEED_DW:
        at = x_ptr + (n * x_stride_n + h * x_stride_h + w * x_stride_w)[:, None] + (c * x_stride_c)[None, :]
        x = tl.load(at, ok, 0).to(ACC)
        slab_ptr += tile_m.to(tl.int64) * slab_stride

    if UNROLL:
        # Which taps are the class's is known at run time only: t and u count up to the most that any class has.
        MOST_T: tl.constexpr = (R + R_STEP - 1) // R_STEP
        MOST_U: tl.constexpr = (S + S_STEP - 1) // S_STEP
        for tap in tl.static_range(MOST_T * MOST_U):
            t = tap // MOST_U
            u = tap % MOST_U
            r = r0 + t * R_STEP
            s = s0 + u * S_STEP
            if (r < R) & (s < S):
                dx = add_tap_backward(
                    dx,
                    x,
                    r,
                    s,
                    i + (base_h + t * STEP_H),
                    j + (base_w + u * STEP_W),
                    n,
                    P,
                    Q,
                    pixel_ok,
                    c,
                    c_ok,
                    dy_ptr,
                    dy_stride_n,
                    dy_stride_k,
                    dy_stride_p,
                    dy_stride_q,
                    w_ptr,
                    w_stride_k,
                    w_stride_r,
                    w_stride_s,
                    slab_ptr,
                    S,
                    R * S,
                    MULT,
                    NEED_DX,
                    NEED_DW,
                    ACC,
                )
    else:
        r_lo, r_hi, s_lo, s_hi = patch_taps(
            tile_m,
            rows,
            cols,
            1,
            1,
            base_h,
            base_w,
            STEP_H,
            STEP_W,
            P,
            Q,
            tl.cdiv(R - r0, R_STEP),
            tl.cdiv(S - s0, S_STEP),
            BLOCK_M,
            PATCH_P,
            PATCH_Q,
        )
        for t in range(r_lo, r_hi):
            for u in range(s_lo, s_hi):
                dx = add_tap_backward(
                    dx,
                    x,
                    r0 + t * R_STEP,
                    s0 + u * S_STEP,
                    i + (base_h + t * STEP_H),
                    j + (base_w + u * STEP_W),
                    n,
                    P,
                    Q,
                    pixel_ok,
                    c,
                    c_ok,
                    dy_ptr,
                    dy_stride_n,
                    dy_stride_k,
                    dy_stride_p,
                    dy_stride_q,
                    w_ptr,
                    w_stride_k,
                    w_stride_r,
                    w_stride_s,
                    slab_ptr,
                    S,
                    R * S,
                    MULT,
                    NEED_DX,
                    NEED_DW,
                    ACC,
                )
    if NEED_DX:
        at = dx_ptr + (n * dx_stride_n + h * dx_stride_h + w * dx_stride_w)[:, None] + (c * dx_stride_c)[None, :]
        tl.store(at, dx.to(dx_ptr.dtype.element_ty), ok)


def tile_shape(elements: int, nhwc: bool, channels: int, rows: int, columns: int) -> tuple[triton.Config, dict]:
    """The tile for a layout and an image of (rows, columns). NHWC: up to 64 channels (32 backward) side by side, and
    pixels for the rest. NCHW: pixels of one image, and channels for the rest."""
    rows, columns, channels = (power_of_2_at_least(extent) for extent in (rows, columns, channels))
    if nhwc:
        patch_p, patch_q = min(rows, 16), min(columns, 8)
        block_c = min(channels, 131072 // elements)
        block_m = elements // block_c
    else:
        patch_p, patch_q = min(rows, 16), min(columns, 64)
        block_m = patch_p * patch_q
        block_c = min(channels, elements // block_m)
    config = triton.Config({"BLOCK_M": block_m, "BLOCK_C": block_c}, num_warps=8, num_stages=1)
    return config, {"PATCH_P": patch_p, "PATCH_Q": patch_q}


def depthwise_geometry(problem) -> dict:
    """As direct.geometry, with all channels in place of one group's, and how a filter larger than LARGEST_UNROLLED or
    dilated is walked."""
    shape = {**geometry(problem), "C": problem.c, "K": problem.k, "MULT": problem.k // problem.c}
    return {**shape, "UNROLL": problem.r * problem.s <= LARGEST_UNROLLED and not problem.is_dilated}


def fprop(problem, x, w, epilogue, y) -> Launch:
    """y, of problem.y_shape and any strides, becomes fprop(x, w) with the epilogue applied."""
    config, patch = tile_shape(FPROP_TILE, problem.x_layout == Layout.NHWC, problem.k, problem.p, problem.q)
    arguments = {
        "x_ptr": x,
        "w_ptr": w,
        "y_ptr": y,
        **depthwise_geometry(problem),
        **epilogue_arguments(epilogue),
        **patch,
        **strides("x", "nchw", x),
        **strides("w", "kcrs", w),
        **strides("y", "nkpq", y),
        "ACC": accumulate(x.dtype),
        "INDEX": index_type(x, y, epilogue.residual),
    }
    del arguments["C"], arguments["w_stride_c"]

    def grid(meta):
        tiles = tile_count(meta["BLOCK_M"], patch["PATCH_P"], patch["PATCH_Q"], problem.n, problem.p, problem.q)
        return (tiles * triton.cdiv(problem.k, meta["BLOCK_C"]),)

    return Launch(depthwise_fprop_kernel, grid, (config,), arguments)


def backward(problem, dy, x, w, dx, dw) -> list[Launch]:
    """dx and dw become dgrad(dy, w) and wgrad(dy, x), in one pass; either may be None, and then w or x may be, too."""
    steps, rows, columns = residue_classes(problem)
    config, patch = tile_shape(BACKWARD_TILE, problem.y_layout == Layout.NHWC, problem.c, rows, columns)
    tiles = tile_count(config.kwargs["BLOCK_M"], patch["PATCH_P"], patch["PATCH_Q"], problem.n, rows, columns)
    slabs = None
    arguments = {**depthwise_geometry(problem), **steps, **patch}
    del arguments["K"]
    if dw is not None:
        # Taps that a looping kernel skips leave their place in the slab untouched.
        allocate = dw.new_empty if arguments["UNROLL"] else dw.new_zeros
        slabs = allocate((tiles, *dw.shape), dtype=problem.accumulate_dtype)
    arguments |= {
        "dy_ptr": dy,
        "x_ptr": x,
        "w_ptr": w,
        "dx_ptr": dx,
        "slab_ptr": slabs,
        "slab_stride": problem.w_size,
        **strides("dy", "nkpq", dy),
        **strides("x", "nchw", x),
        **strides("w", "kcrs", w),
        **strides("dx", "nchw", dx),
        "ACC": accumulate(dy.dtype),
        "INDEX": index_type(dy, x, dx),
    }
    del arguments["w_stride_c"]

    def grid(meta):
        return (tiles * problem.stride_h * problem.stride_w * triton.cdiv(problem.c, meta["BLOCK_C"]),)

    launches = [Launch(depthwise_backward_kernel, grid, (config,), arguments)]
    if dw is not None:
        launches.append(reduction.add_slabs(slabs, dw))
    return launches

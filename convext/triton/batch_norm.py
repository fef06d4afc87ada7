"""Batch norm over the images and pixels of each channel: statistics, forward with activation, backward.

    mean = sum y / M          var = sum (y - mean)^2 / M          M = N*P*Q
    z    = gamma * xhat + beta + residual,     xhat = (y - mean) * rstd,     out = activation(z)
    dz   = dout * activation'(z)               dbeta = sum dz                dgamma = sum dz * xhat
    dy   = gamma * rstd * (dz - dbeta/M - xhat * dgamma/M)       training: mean and var depend on y
    dy   = gamma * rstd * dz                                     inference: they are constants

All kernels see y as (N, M, C): images, pixels of one image at one distance, channels; channels-last memory is a single
long image. A tile is BLOCK_M pixels by BLOCK_C channels.

The sum of squares less the square of the sum cancels when the mean is large. So each tile takes its own mean and its
own squared distances from that, and tiles are merged by Chan, Golub and LeVeque's rule,

    mean_ab = mean_a + (mean_b - mean_a) * n_b / n_ab
    M2_ab   = M2_a + M2_b + (mean_b - mean_a)^2 * n_a * n_b / n_ab

BLOCK_S tiles at a time, in order. The sums of the backward pass go through slabs (reduction.py), in order too, without
atomics.
z is recomputed from y where it is wanted, so that the forward pass keeps y alone.
"""

import triton
import triton.language as tl

from . import reduction
from .epilogue import activation
from .launch import Launch, accumulate, index_type, power_of_2_at_least

# Elements of a tile: 16 a thread of 4 warps for each of the tensors in flight.
TILE = 2048


@triton.jit
def tile_of(N, M, C, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """The program's tile: slot (its number among those of its channels), image, pixels, channels, mask of both."""
    tiles_c = tl.cdiv(C, BLOCK_C)
    tiles_m = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    slot = pid // tiles_c
    n = slot // tiles_m
    m = slot % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    c = pid % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    return slot.to(tl.int64), n.to(tl.int64), m, c, (m < M)[:, None] & (c < C)[None, :]


@triton.jit
def as_tensor(size, DTYPE: tl.constexpr):
    """A size as a tensor (1,) of that type. A size of 1 may have become a constant, by Triton's specialisation or by
    Inductor's, and constants have no type to be converted from."""
    return tl.full((1,), 0, DTYPE) + size


@triton.jit
def tile_at(n, m, c, stride_n, stride_m, stride_c, INDEX: tl.constexpr):
    return n * stride_n + (m.to(INDEX) * stride_m)[:, None] + (c.to(INDEX) * stride_c)[None, :]


@triton.jit(do_not_specialize=["N"])
def stats_tile_kernel(
    y_ptr,
    slab_ptr,
    N,
    M,
    C,
    stride_n,
    stride_m,
    stride_c,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and squared distances of one tile into slab (2, slots, C)."""
    slot, n, m, c, ok = tile_of(N, M, C, BLOCK_M, BLOCK_C)
    y = tl.load(y_ptr + tile_at(n, m, c, stride_n, stride_m, stride_c, INDEX), ok, 0).to(ACC)
    count = tl.minimum(BLOCK_M, M - tl.min(m, axis=0)).to(ACC)
    mean = tl.sum(y, axis=0) / count  # (BLOCK_C,)
    away = tl.where(ok, y - mean[None, :], 0.0)
    slots = N * tl.cdiv(M, BLOCK_M)
    at = slab_ptr + slot * C + c
    tl.store(at, mean, c < C)
    tl.store(at + as_tensor(slots, tl.int64) * C, tl.sum(away * away, axis=0), c < C)


@triton.jit(do_not_specialize=["N"])
def stats_merge_kernel(
    slab_ptr,
    mean_ptr,
    var_ptr,
    N,
    M,
    C,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Merges the slots of BLOCK_C channels: mean and biased variance."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    tiles_m = tl.cdiv(M, BLOCK_M)
    slots = N * tiles_m
    total = tl.zeros((1,), ACC)
    mean = tl.zeros((BLOCK_C,), ACC)
    m2 = tl.zeros((BLOCK_C,), ACC)
    for block in range(tl.cdiv(slots, BLOCK_S)):
        # Invariant: total, mean and m2 describe the first block*BLOCK_S slots.
        slot = block * BLOCK_S + tl.arange(0, BLOCK_S)
        ok = (slot < slots)[:, None] & (c < C)[None, :]
        at = slab_ptr + slot.to(tl.int64)[:, None] * C + c[None, :]
        slot_mean = tl.load(at, ok, 0)  # (BLOCK_S, BLOCK_C)
        slot_m2 = tl.load(at + as_tensor(slots, tl.int64) * C, ok, 0)
        count = tl.where(slot < slots, tl.minimum(BLOCK_M, M - slot % tiles_m * BLOCK_M), 0).to(ACC)[:, None]
        block_total = tl.sum(count, axis=0)  # (1,)
        block_mean = tl.sum(slot_mean * count, axis=0) / block_total
        away = tl.where(ok, slot_mean - block_mean[None, :], 0.0)
        block_m2 = tl.sum(slot_m2 + away * away * count, axis=0)
        delta = block_mean - mean
        share = block_total / (total + block_total)
        mean += delta * share
        m2 += block_m2 + delta * delta * total * share
        total += block_total
    tl.store(mean_ptr + c, mean, c < C)
    tl.store(var_ptr + c, m2 / total, c < C)


@triton.jit
def normalise(y, mean_ptr, var_ptr, gamma_ptr, beta_ptr, residual, c, C, ok, EPS: tl.constexpr, ACC: tl.constexpr):
    """z, xhat and dz/dy = gamma * rstd of a tile. residual: pointers to the residual's tile, or None."""
    slope = 1.0 / tl.sqrt(tl.load(var_ptr + c, c < C, 1).to(ACC) + EPS)  # (BLOCK_C,)
    xhat = (y - tl.load(mean_ptr + c, c < C, 0).to(ACC)[None, :]) * slope[None, :]  # (BLOCK_M, BLOCK_C)
    z = xhat
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr + c, c < C, 0).to(ACC)
        z = z * gamma[None, :]
        slope = slope * gamma
    if beta_ptr is not None:
        z = z + tl.load(beta_ptr + c, c < C, 0).to(ACC)[None, :]
    if residual is not None:
        z = z + tl.load(residual, ok, 0).to(ACC)
    return z, xhat, slope


@triton.jit(do_not_specialize=["N"])
def bn_act_kernel(
    y_ptr,
    mean_ptr,
    var_ptr,
    gamma_ptr,
    beta_ptr,
    residual_ptr,
    out_ptr,
    N,
    M,
    C,
    y_stride_n,
    y_stride_m,
    y_stride_c,
    z_stride_n,
    z_stride_m,
    z_stride_c,
    out_stride_n,
    out_stride_m,
    out_stride_c,
    EPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out of one tile. z is the residual."""
    slot, n, m, c, ok = tile_of(N, M, C, BLOCK_M, BLOCK_C)
    y = tl.load(y_ptr + tile_at(n, m, c, y_stride_n, y_stride_m, y_stride_c, INDEX), ok, 0).to(ACC)
    residual = None
    if residual_ptr is not None:
        residual = residual_ptr + tile_at(n, m, c, z_stride_n, z_stride_m, z_stride_c, INDEX)
    z, xhat, slope = normalise(y, mean_ptr, var_ptr, gamma_ptr, beta_ptr, residual, c, C, ok, EPS, ACC)
    out, _ = activation(z, ACTIVATION)
    at = out_ptr + tile_at(n, m, c, out_stride_n, out_stride_m, out_stride_c, INDEX)
    tl.store(at, out.to(out_ptr.dtype.element_ty), ok)


@triton.jit(do_not_specialize=["N"])
def bn_act_backward_sums_kernel(
    dout_ptr,
    y_ptr,
    mean_ptr,
    var_ptr,
    gamma_ptr,
    beta_ptr,
    residual_ptr,
    slab_ptr,
    N,
    M,
    C,
    g_stride_n,
    g_stride_m,
    g_stride_c,
    y_stride_n,
    y_stride_m,
    y_stride_c,
    z_stride_n,
    z_stride_m,
    z_stride_c,
    EPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A tile's share of dgamma and dbeta into slab (2, slots, C). g is dout."""
    slot, n, m, c, ok = tile_of(N, M, C, BLOCK_M, BLOCK_C)
    dout = tl.load(dout_ptr + tile_at(n, m, c, g_stride_n, g_stride_m, g_stride_c, INDEX), ok, 0).to(ACC)
    y = tl.load(y_ptr + tile_at(n, m, c, y_stride_n, y_stride_m, y_stride_c, INDEX), ok, 0).to(ACC)
    residual = None
    if residual_ptr is not None:
        residual = residual_ptr + tile_at(n, m, c, z_stride_n, z_stride_m, z_stride_c, INDEX)
    z, xhat, slope = normalise(y, mean_ptr, var_ptr, gamma_ptr, beta_ptr, residual, c, C, ok, EPS, ACC)
    # `where`, for beyond the tile's edge z is beta alone, and zero times its derivative need not be zero.
    _, derivative = activation(z, ACTIVATION)
    dz = tl.where(ok, dout * derivative, 0.0)
    slots = N * tl.cdiv(M, BLOCK_M)
    at = slab_ptr + slot * C + c
    tl.store(at, tl.sum(tl.where(ok, dz * xhat, 0.0), axis=0), c < C)
    tl.store(at + as_tensor(slots, tl.int64) * C, tl.sum(dz, axis=0), c < C)


@triton.jit(do_not_specialize=["N"])
def bn_act_backward_kernel(
    dout_ptr,
    y_ptr,
    mean_ptr,
    var_ptr,
    gamma_ptr,
    beta_ptr,
    residual_ptr,
    dgamma_ptr,
    dbeta_ptr,
    dy_ptr,
    dz_ptr,
    N,
    M,
    C,
    g_stride_n,
    g_stride_m,
    g_stride_c,
    y_stride_n,
    y_stride_m,
    y_stride_c,
    z_stride_n,
    z_stride_m,
    z_stride_c,
    dy_stride_n,
    dy_stride_m,
    dy_stride_c,
    dz_stride_n,
    dz_stride_m,
    dz_stride_c,
    EPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TRAINING: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dy, and dz, the residual's gradient, where there is one."""
    slot, n, m, c, ok = tile_of(N, M, C, BLOCK_M, BLOCK_C)
    dout = tl.load(dout_ptr + tile_at(n, m, c, g_stride_n, g_stride_m, g_stride_c, INDEX), ok, 0).to(ACC)
    y = tl.load(y_ptr + tile_at(n, m, c, y_stride_n, y_stride_m, y_stride_c, INDEX), ok, 0).to(ACC)
    residual = None
    if residual_ptr is not None:
        residual = residual_ptr + tile_at(n, m, c, z_stride_n, z_stride_m, z_stride_c, INDEX)
    z, xhat, slope = normalise(y, mean_ptr, var_ptr, gamma_ptr, beta_ptr, residual, c, C, ok, EPS, ACC)
    # `where`, for beyond the tile's edge z is beta alone, and zero times its derivative need not be zero.
    _, derivative = activation(z, ACTIVATION)
    dz = tl.where(ok, dout * derivative, 0.0)
    if dz_ptr is not None:
        at = dz_ptr + tile_at(n, m, c, dz_stride_n, dz_stride_m, dz_stride_c, INDEX)
        tl.store(at, dz.to(dz_ptr.dtype.element_ty), ok)
    if TRAINING:
        count = as_tensor(N, ACC) * as_tensor(M, ACC)
        dgamma = tl.load(dgamma_ptr + c, c < C, 0) / count
        dbeta = tl.load(dbeta_ptr + c, c < C, 0) / count
        dz = dz - dbeta[None, :] - xhat * dgamma[None, :]
    at = dy_ptr + tile_at(n, m, c, dy_stride_n, dy_stride_m, dy_stride_c, INDEX)
    tl.store(at, (dz * slope[None, :]).to(dy_ptr.dtype.element_ty), ok)


class Pixels:
    """What the kernels see of tensors (N, C, H, W) of one shape: (N, M, C), M pixels at one distance from each other.

    Where every tensor lies so that all images are one row of pixels (channels-last), N is 1. A tensor whose rows are
    not evenly spaced is copied first: `see` returns what to read.
    """

    def __init__(self, *tensors):
        n, c, h, w = next(t for t in tensors if t is not None).shape
        self.tensors = [t if t is None or _evenly_spaced(t) else t.contiguous() for t in tensors]
        present = [t for t in self.tensors if t is not None]
        one_row = all(n == 1 or t.stride(0) == h * w * _pixel_stride(t) for t in present)
        self.n, self.m, self.c = (1, n * h * w, c) if one_row else (n, h * w, c)
        side_by_side = all(t.stride(1) == 1 for t in present) and c > 1
        block_c = min(power_of_2_at_least(c), 64) if side_by_side else 1
        self.block_m = min(power_of_2_at_least(self.m), TILE // block_c)
        if not side_by_side:
            block_c = min(power_of_2_at_least(c), TILE // self.block_m)
        self.config = triton.Config({"BLOCK_M": self.block_m, "BLOCK_C": block_c}, num_warps=4, num_stages=1)
        self.slots = self.n * triton.cdiv(self.m, self.block_m)
        self.sizes = {"N": self.n, "M": self.m, "C": self.c}
        self.common = {**self.sizes, "INDEX": index_type(*present), "ACC": accumulate(present[0].dtype)}

    def grid(self, meta):
        return (self.slots * triton.cdiv(self.c, meta["BLOCK_C"]),)

    def strides(self, *names) -> dict:
        """Strides of the tensors by the kernels' names, in the order they were given."""
        result = {}
        for name, t in zip(names, self.tensors, strict=True):
            values = (0, 0, 0) if t is None else (t.stride(0), _pixel_stride(t), t.stride(1))
            prefix = f"{name}_" if name else ""
            result |= {f"{prefix}stride_{axis}": value for axis, value in zip("nmc", values)}
        return result


def _evenly_spaced(t) -> bool:
    h, w = t.shape[2:]
    return h == 1 or w == 1 or t.stride(2) == w * t.stride(3)


def _pixel_stride(t) -> int:
    return t.stride(2) if t.shape[3] == 1 else t.stride(3)


def batch_stats(y, mean, var) -> list[Launch]:
    """mean and var, (C) in the accumulate dtype, become y's, var the biased one."""
    pixels = Pixels(y)
    slab = mean.new_empty((2, pixels.slots, pixels.c))
    merge = triton.Config({"BLOCK_S": 64, "BLOCK_C": 16}, num_warps=4, num_stages=1)
    return [
        Launch(
            stats_tile_kernel,
            pixels.grid,
            (pixels.config,),
            {"y_ptr": pixels.tensors[0], "slab_ptr": slab, **pixels.common, **pixels.strides("")},
        ),
        Launch(
            stats_merge_kernel,
            lambda meta: (triton.cdiv(pixels.c, meta["BLOCK_C"]),),
            (merge,),
            {
                "slab_ptr": slab,
                "mean_ptr": mean,
                "var_ptr": var,
                **pixels.sizes,
                "ACC": accumulate(y.dtype),
                "BLOCK_M": pixels.block_m,
            },
        ),
    ]


def bn_act(y, mean, var, gamma, beta, residual, eps, activation, out) -> Launch:
    """out, with evenly spaced pixels, becomes activation(batch norm of y + residual)."""
    pixels = Pixels(y, residual, out)
    y, residual, _ = pixels.tensors
    return Launch(
        bn_act_kernel,
        pixels.grid,
        (pixels.config,),
        {
            "y_ptr": y,
            "mean_ptr": mean,
            "var_ptr": var,
            "gamma_ptr": gamma,
            "beta_ptr": beta,
            "residual_ptr": residual,
            "out_ptr": out,
            **pixels.common,
            **pixels.strides("y", "z", "out"),
            "EPS": eps,
            "ACTIVATION": activation,
        },
    )


def bn_act_backward(
    dout, y, mean, var, gamma, beta, residual, eps, activation, training, dy, dgamma, dbeta, dz
) -> list[Launch]:
    """dy and dz, the residual's gradient or None, both with evenly spaced pixels; dgamma and dbeta, (C)."""
    pixels = Pixels(dout, y, residual, dy, dz)
    dout, y, residual, _, _ = pixels.tensors
    slabs = dgamma.new_empty((2, pixels.slots, pixels.c))
    arguments = {
        "dout_ptr": dout,
        "y_ptr": y,
        "mean_ptr": mean,
        "var_ptr": var,
        "gamma_ptr": gamma,
        "beta_ptr": beta,
        "residual_ptr": residual,
        **pixels.common,
        "EPS": eps,
        "ACTIVATION": activation,
    }
    all_strides = pixels.strides("g", "y", "z", "dy", "dz")
    read_strides = {name: value for name, value in all_strides.items() if not name.startswith("d")}
    return [
        Launch(
            bn_act_backward_sums_kernel, pixels.grid, (pixels.config,), {**arguments, **read_strides, "slab_ptr": slabs}
        ),
        reduction.add_slabs(slabs[0], dgamma),
        reduction.add_slabs(slabs[1], dbeta),
        Launch(
            bn_act_backward_kernel,
            pixels.grid,
            (pixels.config,),
            {
                **arguments,
                **all_strides,
                "dgamma_ptr": dgamma,
                "dbeta_ptr": dbeta,
                "dy_ptr": dy,
                "dz_ptr": dz,
                "TRAINING": training,
            },
        ),
    ]

"""What happens to a tile between the accumulator and memory.

    out = activation(gamma * (acc + bias - mean) / sqrt(var + eps) + beta + residual)        every part may be absent

The activations and their derivatives are those of csrc/core/epilogue.h, by name. Each is written with `where`, so that
a NaN passes through as it does in PyTorch.
"""

import triton
import triton.language as tl


@triton.jit
def activation(z, ACTIVATION: tl.constexpr):
    """The activation's value and its derivative at z. The compiler drops whichever its caller does not use."""
    one = tl.full(z.shape, 1.0, z.dtype)
    if ACTIVATION == "relu":
        value = tl.where(z < 0, 0.0, z)
        derivative = tl.where(z <= 0, 0.0, one)
    elif ACTIVATION == "relu6":
        value = tl.where(z < 0, 0.0, tl.where(z > 6, 6.0, z))
        derivative = tl.where((z <= 0) | (z >= 6), 0.0, one)
    elif ACTIVATION == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        value = z / (1.0 + tl.exp(-z))
        derivative = sigmoid * (1.0 + z * (1.0 - sigmoid))
    elif ACTIVATION == "hardswish":
        gate = tl.where(z + 3.0 < 0, 0.0, tl.where(z + 3.0 > 6, 6.0, z + 3.0))
        value = z * gate / 6.0
        derivative = tl.where(z <= -3, 0.0, tl.where(z < 3, z / 3.0 + 0.5, one))
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(z * 0.70710678118654752440))
        value = 0.5 * z * (1.0 + tl.erf(z * 0.70710678118654752440))
        derivative = cdf + z * (0.39894228040143267794 * tl.exp(-0.5 * z * z))
    else:
        tl.static_assert(ACTIVATION == "identity", "unknown activation")
        value = z
        derivative = one
    return value, derivative


@triton.jit
def channel_affine(channel, ok, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, EPS: tl.constexpr, ACC: tl.constexpr):
    """scale and shift of each channel: acc * scale + shift is the bias and the batch norm in one. A pointer is None
    where its part is absent; mean and var come together."""
    scale = tl.full(channel.shape, 1.0, ACC)
    shift = tl.zeros(channel.shape, ACC)
    if bias_ptr is not None:
        shift = tl.load(bias_ptr + channel, ok, 0).to(ACC)
    if mean_ptr is not None:
        scale = 1.0 / tl.sqrt(tl.load(var_ptr + channel, ok, 1).to(ACC) + EPS)
        shift = shift - tl.load(mean_ptr + channel, ok, 0).to(ACC)
    if gamma_ptr is not None:
        scale = scale * tl.load(gamma_ptr + channel, ok, 0).to(ACC)
    shift = shift * scale
    if beta_ptr is not None:
        shift = shift + tl.load(beta_ptr + channel, ok, 0).to(ACC)
    return scale, shift


@triton.jit
def finish_tile(
    acc,
    n,
    p,
    q,
    pixel_ok,
    channel,
    channel_ok,
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
    EPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Applies the epilogue to acc (pixels, channels) and writes it to y. z is the residual."""
    scale, shift = channel_affine(channel, channel_ok, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, EPS, ACC)
    out = acc * scale[None, :] + shift[None, :]
    ok = pixel_ok[:, None] & channel_ok[None, :]
    if residual_ptr is not None:
        z = residual_ptr + (n * z_stride_n + p * z_stride_p + q * z_stride_q)[:, None] + (channel * z_stride_k)[None, :]
        out += tl.load(z, ok, 0).to(ACC)
    out, _ = activation(out, ACTIVATION)
    y = y_ptr + (n * y_stride_n + p * y_stride_p + q * y_stride_q)[:, None] + (channel * y_stride_k)[None, :]
    tl.store(y, out.to(y_ptr.dtype.element_ty), ok)

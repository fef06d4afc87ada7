"""The fused operations as compositions of differentiable torch operations: what they mean, and what runs where the
fused kernels cannot (second derivatives, forward mode, vmap).

Activations are (..., N, C, H, W) and what belongs to channels (..., C): the dots are vmap's."""

from __future__ import annotations

import torch

from .activation import BACKWARD, FORWARD
from .problem import Epilogue, accumulate_dtype

_NHW = (-4, -2, -1)


def _channels(t: torch.Tensor) -> torch.Tensor:
    return t[..., None, :, None, None]


def batch_stats(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance per channel, in the accumulate dtype."""
    var, mean = torch.var_mean(y.to(accumulate_dtype(y.dtype)), _NHW, correction=0)
    return mean, var


def _normalise(y: torch.Tensor, epilogue: Epilogue) -> tuple[torch.Tensor, torch.Tensor]:
    mean, var = epilogue.mean, epilogue.var
    assert mean is not None and var is not None
    acc = accumulate_dtype(y.dtype)
    rstd = torch.rsqrt(var.to(acc) + epilogue.eps)
    return (y.to(acc) - _channels(mean.to(acc))) * _channels(rstd), rstd


def _affine(xhat: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
    gamma, beta, residual = epilogue.gamma, epilogue.beta, epilogue.residual
    z = xhat if gamma is None else xhat * _channels(gamma.to(xhat.dtype))
    z = z if beta is None else z + _channels(beta.to(xhat.dtype))
    return z if residual is None else z + residual.to(xhat.dtype)


def bn_act(y: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
    """activation((y - mean) / sqrt(var + eps) * gamma + beta + residual), in y's dtype."""
    xhat, _ = _normalise(y, epilogue)
    return FORWARD[epilogue.activation](_affine(xhat, epilogue)).to(y.dtype)


def bn_act_backward(
    dout: torch.Tensor, y: torch.Tensor, epilogue: Epilogue, training: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of bn_act by dy, dgamma, dbeta and dresidual. With `training`, mean and var are functions of y:

        dy = gamma * rstd * (dz - mean(dz) - xhat * mean(dz * xhat))       (Ioffe and Szegedy, 2015, section 3)

    and else they are constants, so that dy = gamma * rstd * dz.
    """
    xhat, rstd = _normalise(y, epilogue)
    dz = BACKWARD[epilogue.activation](dout.to(xhat.dtype), _affine(xhat, epilogue))
    dbeta, dgamma = dz.sum(_NHW), (dz * xhat).sum(_NHW)
    scale = rstd if epilogue.gamma is None else rstd * epilogue.gamma.to(rstd.dtype)
    dy = dz
    if training:
        count = y.shape[-4] * y.shape[-2] * y.shape[-1]
        dy = dz - _channels(dbeta / count) - xhat * _channels(dgamma / count)
    return (_channels(scale) * dy).to(y.dtype), dgamma, dbeta, dz.to(y.dtype)


def act(z: torch.Tensor, residual: torch.Tensor | None, activation: str) -> torch.Tensor:
    """activation(z + residual)"""
    return FORWARD[activation](z if residual is None else z + residual)

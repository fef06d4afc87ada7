"""Causal depthwise 1-D convolution with an activation, as state-space models (Mamba) use it: over a whole sequence, and
over the next few values of a stream whose past is kept in a state."""

from __future__ import annotations

import torch
from torch.overrides import handle_torch_function, has_torch_function

from .checks import check_activation
from .functional import conv_act


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str = "silu",
    initial_state: torch.Tensor | None = None,
    return_final_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Each channel's causal convolution and activation: y[n, c, i] = activation(bias[c] + sum over s of weight[c, s] *
    x[n, c, i - (S - 1) + s]), where values in front of x are those of `initial_state`, or zero.

    Args:
        x: (N, C, L), sequences of C channels; best in the memory format of x.transpose(1, 2).contiguous().
        weight: (C, S), or (C, 1, S) as torch.nn.Conv1d(C, C, S, groups=C) has it, of x's dtype.
        bias: (C), or None, the default.
        activation: one of those of `conv_bn_act`; default "silu"; "identity" for none.
        initial_state: (N, C, S - 1), the values in front of x; None, the default, for zeros.
        return_final_state: whether the values that the next call needs in front of its own are returned; default False.

    Returns: y, (N, C, L) of x's dtype; with `return_final_state` (y, state), where state is (N, C, S - 1) and has
        memory of its own. Differentiable in all tensors, state included. Without `initial_state` no padded copy is
        made: y is a view without the last S - 1 of L + S - 1 values.

    Raises ValueError where a shape does not fit or the activation is unknown, naming the argument, and RuntimeError
    where dtypes or devices differ.

    Example:
        >>> x, w = torch.randn(2, 64, 100), torch.randn(64, 4)
        >>> y, state = convext.causal_conv1d(x[..., :60], w, return_final_state=True)
        >>> rest = convext.causal_conv1d(x[..., 60:], w, initial_state=state)
        >>> bool(torch.allclose(torch.cat([y, rest], -1), convext.causal_conv1d(x, w), atol=1e-6))
        True
    """
    tensors = x, weight, bias, initial_state
    if has_torch_function(tensors):
        result: torch.Tensor | tuple[torch.Tensor, torch.Tensor] = handle_torch_function(
            causal_conv1d,
            tensors,
            x,
            weight,
            bias,
            activation=activation,
            initial_state=initial_state,
            return_final_state=return_final_state,
        )
        return result
    filters = _filters(x, weight)
    _expect("x", x, 3, "(N, C, L)")
    n, channels, length = x.shape
    before = filters.shape[-1] - 1
    if initial_state is None:
        y = _convolved(x, filters, bias, before, activation)[..., :length]
    else:
        if initial_state.shape != (n, channels, before):
            raise ValueError(
                f"initial_state: expected (N, C, S - 1) = {(n, channels, before)}, got {tuple(initial_state.shape)}"
            )
        y = _convolved(torch.cat([initial_state, x], -1), filters, bias, 0, activation)
    if not return_final_state:
        return y
    if length >= before:
        return y, x[..., length - before :].clone()
    front = x.new_zeros(n, channels, before) if initial_state is None else initial_state
    return y, torch.cat([front[..., length:], x], -1)


@torch.no_grad()
def causal_conv1d_update(
    x: torch.Tensor,
    state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str = "silu",
) -> torch.Tensor:
    """The next values of a stream: `causal_conv1d` of x behind `state`, which is written: it then ends in x. Without
    gradients.

    Args:
        x: (N, C), one value a channel, or (N, C, L).
        state: (N, C, M) with M >= S - 1, the values in front of x; as `causal_conv1d` returns it, or zeros at first.
        weight, bias, activation: as in `causal_conv1d`.

    Returns: (N, C), or (N, C, L).

    Raises ValueError and RuntimeError where `causal_conv1d` does, and for a state that does not fit; nothing is written
        then.

    Example:
        >>> x, w = torch.randn(2, 64, 10), torch.randn(64, 4)
        >>> state = torch.zeros(2, 64, 3)
        >>> stream = torch.stack([convext.causal_conv1d_update(x[..., i], state, w) for i in range(10)], -1)
        >>> bool(torch.allclose(stream, convext.causal_conv1d(x, w), atol=1e-6))
        True
    """
    filters = _filters(x, weight)
    if x.dim() not in (2, 3):
        raise ValueError(f"x: expected (N, C) or (N, C, L), got {tuple(x.shape)}")
    values = x.unsqueeze(-1) if x.dim() == 2 else x
    before = filters.shape[-1] - 1
    if state.dim() != 3 or state.shape[:2] != values.shape[:2] or state.shape[2] < before:
        n, channels = values.shape[:2]
        raise ValueError(
            f"state: expected (N, C, M) = ({n}, {channels}, M) with M >= {before}, got {tuple(state.shape)}"
        )
    if state.dtype != x.dtype:
        raise RuntimeError(f"state: expected x's dtype {x.dtype}, got {state.dtype}")
    all_values = torch.cat([state, values], -1)
    y = _convolved(all_values[..., state.shape[2] - before :], filters, bias, 0, activation)
    state.copy_(all_values[..., all_values.shape[2] - state.shape[2] :])
    return y.squeeze(-1) if x.dim() == 2 else y


def _filters(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(C, 1, 1, S)."""
    for name, value in (("x", x), ("weight", weight)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    filters = weight.unsqueeze(1) if weight.dim() == 2 else weight
    _expect("weight", filters, 3, "(C, S) or (C, 1, S)", weight)
    if filters.shape[1] != 1 or filters.shape[2] < 1 or x.dim() < 2 or filters.shape[0] != x.shape[1]:
        raise ValueError(
            f"weight: expected (C, S) or (C, 1, S) with C = {x.shape[1] if x.dim() > 1 else '?'} for x "
            f"{tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    return filters.unsqueeze(2)


def _expect(name: str, t: torch.Tensor, dims: int, shape: str, given: torch.Tensor | None = None) -> None:
    if t.dim() != dims:
        raise ValueError(f"{name}: expected {shape}, got {tuple((t if given is None else given).shape)}")


def _convolved(
    x: torch.Tensor, filters: torch.Tensor, bias: torch.Tensor | None, padding: int, activation: str
) -> torch.Tensor:
    """The convolution of images of one row, padded on both sides."""
    check_activation(activation)
    groups = filters.shape[0]
    image = x.unsqueeze(2)
    return conv_act(image, filters, bias, padding=(0, padding), groups=groups, activation=activation).squeeze(2)

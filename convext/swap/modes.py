"""What stands around a call: who listens to it, or wants it recorded, and what a plan is compiled for."""

from typing import NamedTuple

import torch
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from .. import ops

_function_modes = torch._C._len_torch_function_stack
_grad_enabled = torch.is_grad_enabled


class Mode(NamedTuple):
    """What a plan is compiled for.

    in_seam    values between layers may be in any memory format (schedule/layout.py)
    direct     nothing stands between a call and its kernel: no gradients, modes or transforms, but for autocast
    autocast   the dtype to which tensors on the CPU are cast in such a call, or None
    """

    in_seam: bool = False
    direct: bool = False
    autocast: torch.dtype | None = None

    @property
    def casts_nothing(self) -> bool:
        """A direct one without autocast, under which a LayerNorm is computed in float32."""
        return self.direct and self.autocast is None


_RECORDED, _DIRECT = [Mode(seam) for seam in (False, True)], [Mode(seam, True) for seam in (False, True)]


def present(in_seam: bool) -> Mode:
    """The mode of a call that is made now."""
    if _grad_enabled() or forward_ad._current_level >= 0 or not ops.idle_but_for_autocast():
        return _RECORDED[in_seam]
    if not ops._autocast_active():
        return _DIRECT[in_seam]
    if torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda"):
        return Mode(in_seam, True, torch.get_autocast_dtype("cpu"))
    return _RECORDED[in_seam]


def function_mode_watches() -> bool:
    """True inside a TorchFunctionMode, which must see what the user's code calls. That of `torch.device` only says
    where new tensors lie."""
    return _function_modes() > 0 and any(
        type(torch._C._get_function_stack_at(i)) is not DeviceContext for i in range(_function_modes())
    )

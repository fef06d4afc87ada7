"""What stands around a call: who listens to it, or wants it recorded."""
import torch
from torch.utils._device import DeviceContext

_function_modes = torch._C._len_torch_function_stack


def function_mode_watches() -> bool:
    """True inside a TorchFunctionMode, which must see what the user's code calls. That of `torch.device` only says
    where new tensors lie."""
    return _function_modes() > 0 and any(type(torch._C._get_function_stack_at(i)) is not DeviceContext
                                         for i in range(_function_modes()))

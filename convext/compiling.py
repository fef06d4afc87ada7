"""What torch.compile sees of torch.ops.convext.*: the Triton kernels, where Triton serves a call.

To a compiler an operator is a closed box. Where Triton's kernels serve one, Inductor can do better: launch them from
its own wrapper, without the dispatcher and without the selection, and plan their memory along with everything else. So
while a graph is made functional, which is when operators are taken apart, a call that Triton serves is replaced by the
operators of convext/triton/ops.py, and those by the kernels inside.

A box stays a box where another backend serves (its launches are no business of Inductor's), where sizes are symbolic
(a launch is laid out for one shape: taken apart, the graph would be compiled again for every other), where there is
nothing to compute, and under torch.export, whose graphs are to run elsewhere.

The choice is the one of the time of compilation: a graph compiled under `convext.backend("triton")` keeps its kernels.
"""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

from . import backends, checks, ops
from .problem import ConvProblem, Epilogue, Geom, Pass

_KNOWN = frozenset((torch.Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor))


def _serves(pass_: Pass, problem: ConvProblem, kind: str = "") -> bool:
    return backends.would_serve(pass_, problem, kind).backend.name == "triton"


def _serves_batch_norm(y) -> bool:
    return backends.select_batch_norm(y).name == "triton"


def _triton():
    from .triton import ops as triton_ops

    return triton_ops


# Each takes an operator's arguments and returns its results, or None for a call that stays a box.


def _fprop(x, w, bias, stride, padding, dilation, groups, *channels_last):
    return _conv_bn_act(x, w, *Epilogue(bias), stride, padding, dilation, groups, *channels_last)


def _conv_bn_act(x, w, *arguments):
    epilogue, geom, channels_last = ops.take_apart(arguments)
    checks.check_activation(epilogue.activation)
    checks.check_conv(x, w, epilogue.bias, geom)
    checks.check_batch_norm(x.dtype, w.shape[0], *epilogue.norm)
    if not _serves(Pass.FPROP, ConvProblem.of_fprop(x, w, geom, *channels_last), epilogue.kind):
        return None
    return _triton().fprop(x, w, *epilogue, *geom, *channels_last)


def _conv_bn_act_train(x, w, *arguments):
    epilogue, geom, _ = ops.take_apart(arguments)
    ops.check_of_the_batch(epilogue)
    y = _fprop(x, w, epilogue.bias, *geom)
    if y is None:
        return None
    mean, var = _triton().batch_stats(y)
    return _triton().bn_act(y, mean, var, *epilogue[3:]), y, mean, var


def _dgrad(dy, w, input_size, stride, padding, dilation, groups, channels_last=None):
    geom = Geom(tuple(stride), tuple(padding), tuple(dilation), groups)
    if not _serves(Pass.DGRAD, ConvProblem.of_dgrad(dy, w, input_size, geom, channels_last)):
        return None
    return _triton().dgrad(dy, w, input_size, *geom, channels_last)


def _wgrad(dy, x, kernel_size, stride, padding, dilation, groups, channels_last=None):
    geom = Geom(tuple(stride), tuple(padding), tuple(dilation), groups)
    if not _serves(Pass.WGRAD, ConvProblem.of_wgrad(dy, x, kernel_size, geom)):
        return None
    if channels_last is None:
        channels_last = ops.guess_dw_format(x, (dy.shape[1], x.shape[1] // groups, *kernel_size))
    return _triton().wgrad(dy, x, kernel_size, *geom, channels_last)


def _batch_stats(y):
    return _triton().batch_stats(y) if _serves_batch_norm(y) else None


def _bn_act(y, *others):
    return _triton().bn_act(y, *others) if _serves_batch_norm(y) else None


def _bn_act_backward(dout, y, *others):
    return _triton().bn_act_backward(dout, y, *others) if _serves_batch_norm(y) else None


_PARTS = {
    "fprop": _fprop,
    "conv_bn_act": _conv_bn_act,
    "conv_bn_act_train": _conv_bn_act_train,
    "dgrad": _dgrad,
    "wgrad": _wgrad,
    "batch_stats": _batch_stats,
    "bn_act": _bn_act,
    "bn_act_backward": _bn_act_backward,
}


def _static(arguments) -> bool:
    """Whether no size is symbolic and no tensor empty."""
    for a in arguments:
        if isinstance(a, torch.Tensor):
            if not all(type(n) is int for n in (*a.shape, *a.stride())) or a.numel() == 0:
                return False
        elif not all(not isinstance(n, torch.SymInt) for n in (a if isinstance(a, (list, tuple)) else (a,))):
            return False
    return True


def _register(name: str, take_apart) -> None:
    def rule(mode, op, types, args, kwargs=None):
        kwargs = kwargs or {}
        for_export = not torch._functorch.config.decompose_custom_triton_ops
        if not (for_export or kwargs) and _KNOWN.issuperset(types) and _static(args):
            with mode:
                result = take_apart(*args)
            if result is not None:
                return result
        return mode.__torch_dispatch__(op, types, args, kwargs)

    torch.library.register_torch_dispatch(f"convext::{name}", FunctionalTensorMode, rule, lib=ops.LIBRARY)


for _name in ops.NAMES:
    _register(_name, _PARTS[_name])

"""ConvProblem and its companions against their C++ twins, whose headers are read as text."""

import itertools
import pathlib
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch.utils import _pytree

from convext.problem import (
    ACTIVATIONS,
    DTYPES,
    ConvProblem,
    DType,
    Epilogue,
    Geom,
    Layout,
    Pass,
    tf32_is_allowed,
)

CSRC = pathlib.Path(__file__).parent.parent / "csrc"


def _struct_fields(header, name):
    body = re.search(rf"struct {name} {{(.*?)CONVEXT_HD", (CSRC / header).read_text(), re.S).group(1)
    body = re.sub(r"//.*", "", body)
    declarations = re.findall(r"(?:int32_t|DType|Layout)\s+([\w, =]+);", body)
    return [field.partition("=")[0].strip() for names in declarations for field in names.split(",")]


def _enum(header, name):
    body = re.search(rf"enum class {name} : int32_t {{(.*?)}};", (CSRC / header).read_text()).group(1)
    return {key: int(value) for key, value in re.findall(r"k(\w+) = (\d+)", body)}


def test_fields_are_those_of_the_header():
    fields = _struct_fields("core/conv_problem.h", "ConvProblem")
    assert len(fields) == 22
    of_python_alone = "device", "axes", "geom", "_hash"
    assert [name for name in ConvProblem.__dataclass_fields__ if name not in of_python_alone] == fields


@pytest.mark.parametrize("ours, name", [(Pass, "Pass"), (DType, "DType"), (Layout, "Layout")])
def test_enum_is_that_of_the_header(ours, name):
    theirs = {key.upper(): value for key, value in _enum("core/conv_problem.h", name).items()}
    assert theirs == {member.name: member.value for member in ours}


def test_activations_are_those_of_the_header():
    (line,) = re.findall(r"#define CONVEXT_ACTIVATIONS\(X\) (.*)", (CSRC / "core" / "epilogue.h").read_text())
    assert re.findall(r"X\((\w+)\)", line) == list(ACTIVATIONS)
    assert list(ACTIVATIONS.values()) == list(range(len(ACTIVATIONS)))


def test_dtypes_map_to_torch():
    assert {dtype: member.torch for dtype, member in DTYPES.items()} == {dtype: dtype for dtype in DTYPES}


@pytest.mark.parametrize(
    "h, r, stride, padding, dilation", list(itertools.product((5, 8), (1, 3), (1, 2, 3), (0, 2), (1, 2)))
)
def test_output_size_is_pytorchs(h, r, stride, padding, dilation):
    x, w = torch.empty(2, 4, h, h + 1), torch.empty(6, 2, r, 2)
    geom = Geom((stride, 1), (padding, 0), (dilation, 3), 2)
    y = F.conv2d(x, w, None, *geom)
    problem = ConvProblem.of_fprop(x, w, geom)
    assert problem.y_shape == tuple(y.shape) == (2, 6, *geom.output_size(x.shape[2:], w.shape[2:]))
    assert ConvProblem.of_dgrad(y, w, x.shape[2:], geom) == problem == ConvProblem.of_wgrad(y, x, w.shape[2:], geom)
    assert problem.x_size == x.numel() and problem.w_size == w.numel() and problem.y_size == y.numel()


def test_every_pass_has_the_same_flops():
    problem = ConvProblem(2, 8, 9, 7, 12, 3, 2, 2, 1, 1, 0, 1, 2, 4)
    for pass_ in Pass:
        m, n, k = problem.gemm_shape(pass_)
        if pass_ != Pass.DGRAD:  # whose GEMM also multiplies the holes of the stride
            assert 2.0 * m * n * k * problem.groups == problem.flops
    assert problem.gemm_shape(Pass.DGRAD) == (2 * 9 * 7, 2, 3 * 2 * 3)


def test_kinds():
    plain = dict(n=1, h=8, w=8, stride_h=1, stride_w=1, pad_h=0, pad_w=0, dil_h=1, dil_w=1)
    depthwise = ConvProblem(c=4, k=8, r=3, s=3, groups=4, **plain)
    assert depthwise.is_depthwise and not depthwise.is_pointwise and not depthwise.is_dilated
    assert not ConvProblem(c=4, k=4, r=3, s=3, groups=2, **plain).is_depthwise
    assert ConvProblem(c=4, k=4, r=1, s=1, groups=1, **plain).is_pointwise
    plain.update(dil_w=2)
    assert ConvProblem(c=4, k=4, r=1, s=3, groups=1, **plain).is_dilated
    assert not ConvProblem(c=4, k=4, r=3, s=1, groups=1, **plain).is_dilated  # one tap wide: nothing to spread


def test_equal_problems_hash_equal_and_print_what_differs_from_plain():
    one = ConvProblem(1, 2, 3, 3, 4, 3, 3, 1, 1, 1, 1, 1, 1, 1)
    assert one == ConvProblem(1, 2, 3, 3, 4, 3, 3, 1, 1, 1, 1, 1, 1, 1) and len({one, one}) == 1
    assert one != ConvProblem(1, 2, 3, 3, 4, 3, 3, 1, 1, 1, 1, 1, 1, 1, device="cuda")
    assert str(one) == "x 1x2x3x3, w 4x2x3x3, padding 1, float32, cpu"
    with pytest.raises(AttributeError):
        one.n = 2


def test_geom_is_one_value():
    geom = Geom((2, 1), (0, 1), (1, 1), 3)
    assert (geom.stride, geom.padding, geom.dilation, geom.groups) == tuple(geom) == ((2, 1), (0, 1), (1, 1), 3)
    assert pickle.loads(pickle.dumps(geom)) == geom and isinstance(pickle.loads(pickle.dumps(geom)), Geom)
    assert _pytree.tree_leaves([geom]) == [geom]  # torch.func must not take it apart


def test_epilogue_is_empty_by_default():
    assert Epilogue() == Epilogue(None, None, None, None, None, None, 1e-5, "identity")


def test_tf32_is_allowed_as_pytorch_says_in_either_of_its_ways():
    for allowed in (True, False):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed):
            assert tf32_is_allowed() == allowed
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            conv.fp32_precision = precision
            assert tf32_is_allowed() == (precision == "tf32")
    finally:
        conv.fp32_precision = before

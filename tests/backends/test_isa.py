"""The kernels of every instruction set, the same results on any number of threads, and packed weights that are never
stale."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import CASES
from passes import EVEN_SAME, check, run

import convext
from convext.backends import native
from convext.problem import DType, Pass

pytestmark = pytest.mark.filterwarnings(EVEN_SAME)
# float16 is computed by the kernels of float32, and so is bfloat16 but for what AVX512-BF16 has kernels of its own for.
NATIVE_DTYPES = [torch.float32, torch.float64, torch.bfloat16]
BF16_PASSES = {"fprop", "dgrad"}


def test_what_kernels_say_of_themselves_is_what_their_names_say():
    tiles = {"winograd2x2": 2, "winograd3x3": 3, "winograd4x4": 4}
    assert len(native.kernels()) > 50
    for facts in native.kernels():
        pass_, family, dtype, isa = facts["name"].split("_", 3)
        assert Pass(facts["pass"]).name.lower() == pass_ and facts["isa"] == isa and facts["device"] == "cpu"
        assert facts["algorithm"] == family.partition("2x2")[0].partition("3x3")[0].partition("4x4")[0]
        assert facts["tile"] == tiles.get(family, 0)
        assert DType(facts["dtype"]) == {"f32": DType.FLOAT32, "f64": DType.FLOAT64, "bf16": DType.BFLOAT16}[dtype]
        pairs = dtype == "bf16" and family in ("direct", "dilated")
        assert facts["arithmetic"] == ("bfloat16" if pairs else "float64" if dtype == "f64" else "float32")


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case_equals_float64(case, dtype, isa, count_native):
    with convext.backend("native"):
        check(case, dtype)
    if 0 in case.x:
        return
    ran = count_native()
    grouped = {kernel["name"] for kernel in native.kernels() if kernel["algorithm"] == "grouped"}
    assert {pass_ for pass_, _ in ran} == {"fprop", "dgrad", "wgrad"}
    for pass_, kernel in ran:
        own = dtype is torch.bfloat16 and pass_ in BF16_PASSES and kernel not in grouped
        assert kernel.endswith(isa if own else isa.removesuffix("_bf16")), kernel


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_do_not_depend_on_the_number_of_threads(case, dtype):
    operands = case.operands(dtype)
    results = []
    with convext.backend("native"):
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(case, operands))
    for other in results[1:]:
        for name, result in results[0].items():
            assert torch.equal(result, other[name]), name


@pytest.mark.parametrize("channels", [8, 64, 200])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_fused_results_do_not_depend_on_the_number_of_threads(channels, activation):
    x = torch.randn(3, channels, 23, 21)
    w = torch.randn(channels, channels, 1, 1)
    gamma, beta = torch.randn(channels), torch.randn(channels)
    results = []
    with convext.backend("native"):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            mean, var = torch.zeros(channels), torch.ones(channels)
            inputs = [t.clone().requires_grad_() for t in (x, w, gamma, beta)]
            z = convext.conv_bn_relu(
                inputs[0], inputs[1], None, mean, var, inputs[2], inputs[3], training=True, activation=activation
            )
            results.append([z, mean, var, *torch.autograd.grad(z.square().sum(), inputs)])
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


# Packed weights.

LAYERS = {
    "three_by_three": dict(in_channels=16, out_channels=32, kernel_size=3, padding=1),
    "pointwise": dict(in_channels=16, out_channels=32, kernel_size=1),
    "depthwise": dict(in_channels=16, out_channels=16, kernel_size=3, groups=16),
    "groups": dict(in_channels=16, out_channels=32, kernel_size=3, groups=4),
}


def by_multiplication(layer):
    with torch.no_grad():
        layer.weight.mul_(-2)


def by_one_element(layer):
    with torch.no_grad():
        layer.weight[-1, -1, -1, -1] += 1


def by_an_element_that_no_line_at_hand_holds(layer):
    """The lines that packed_weight.h compares in that call are others: the version counter alone tells."""
    with torch.no_grad():
        layer.weight.view(-1)[3] += 1


def by_optimizer_step(layer):
    layer.weight.grad = torch.ones_like(layer.weight)
    torch.optim.SGD([layer.weight], lr=0.5).step()


def by_load_state_dict(layer):
    layer.load_state_dict({name: t + 1 for name, t in layer.state_dict().items()})


def by_data_in_place(layer):
    layer.weight.data.add_(1)  # does not move the version counter


def by_one_element_of_data(layer):
    layer.weight.data[0, 0, 0, 0] += 1


def by_new_data(layer):
    layer.weight.data = torch.randn_like(layer.weight)


def by_new_parameter(layer):
    layer.weight = torch.nn.Parameter(torch.randn_like(layer.weight))


def by_numpy_view(layer):
    layer.weight.detach().numpy()[...] *= 3


def by_inference_mode(layer):
    with torch.inference_mode():
        layer.weight.add_(1)


def by_swapped_halves(layer):
    """The same numbers in another order: no sum of the weights tells them apart."""
    with torch.no_grad():
        layer.weight.copy_(layer.weight.flip(0))


CHANGES = [
    by_multiplication, by_one_element, by_an_element_that_no_line_at_hand_holds, by_optimizer_step, by_load_state_dict,
    by_data_in_place, by_one_element_of_data, by_new_data, by_new_parameter, by_numpy_view, by_inference_mode,
    by_swapped_halves,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", LAYERS)
def test_packed_weights_follow_a_change(name, change):
    layer = convext.nn.Conv2d(**LAYERS[name])
    x = torch.randn(2, 16, 7, 7)
    geometry = layer.stride, layer.padding, layer.dilation, layer.groups

    def agree():
        with torch.no_grad():
            expected = F.conv2d(x, layer.weight, layer.bias, *geometry)
            torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        inputs = x.clone().requires_grad_()
        layer(inputs).sum().backward()
        other = x.clone().requires_grad_()
        F.conv2d(other, layer.weight, layer.bias, *geometry).sum().backward()
        torch.testing.assert_close(inputs.grad, other.grad, rtol=1e-4, atol=1e-4)
        return expected

    with convext.backend("native"):
        before = agree()
        agree()  # from the packed copy
        change(layer)
        assert (agree() - before).abs().max() > 1e-2, "the change changed nothing: this test could not fail"


def test_two_layers_of_one_shape_keep_their_own_packed_weights():
    a, b = (convext.nn.Conv2d(16, 16, 3) for _ in range(2))
    x = torch.randn(1, 16, 6, 6)
    with convext.backend("native"):
        for _ in range(2):
            for layer in (a, b, copy.deepcopy(a)):
                torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias), rtol=1e-4, atol=1e-4)


def test_a_weight_at_the_address_of_a_freed_one_is_packed_anew():
    x = torch.randn(1, 16, 6, 6)
    with convext.backend("native"):
        for _ in range(20):
            w = torch.randn(16, 16, 3, 3)
            torch.testing.assert_close(convext.conv2d(x, w), F.conv2d(x, w), rtol=1e-4, atol=1e-4)
            del w


def test_one_weight_serves_many_geometries_and_passes():
    w = torch.randn(16, 16, 3, 3)
    with convext.backend("native"):
        for _ in range(2):
            for stride, dilation, size in ((1, 1, 9), (2, 1, 9), (1, 2, 12), (1, 1, 40)):
                x = torch.randn(1, 16, size, size, requires_grad=True)
                arguments = None, stride, dilation, dilation
                y, expected = convext.conv2d(x, w, *arguments), F.conv2d(x, w, *arguments)
                torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
                dx, expected = (torch.autograd.grad(t.sum(), x)[0] for t in (y, expected))
                torch.testing.assert_close(dx, expected, rtol=1e-4, atol=1e-4)

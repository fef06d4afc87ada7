"""ResNet-50 and MobileNetV2 swapped, on the native backend alone: every layer in every pass, and not one convolution of
ATen's."""

import pytest
import torch

import convext

torchvision = pytest.importorskip("torchvision")

NETWORKS = {"resnet50": 53, "mobilenet_v2": 52}  # convolutions in each


def profiled_convolutions(profile):
    """ATen's convolutions among the operators that ran, those that other operators called included."""
    return {e.key for e in profile.key_averages() if e.key.startswith("aten::") and "conv" in e.key}


def test_the_profiler_sees_what_the_aten_backend_calls():
    x, w = torch.randn(1, 1, 3, 3, requires_grad=True), torch.randn(1, 1, 3, 3)
    with convext.backend("aten"), torch.profiler.profile() as profile:
        convext.conv2d(x, w).sum().backward()
    assert {"aten::convolution", "aten::convolution_backward"} <= profiled_convolutions(profile)


@pytest.mark.parametrize("name", NETWORKS)
def test_network_runs_and_trains_without_a_word_from_aten(name, count_native):
    plain = getattr(torchvision.models, name)(weights=None, num_classes=10)
    swapped = getattr(torchvision.models, name)(weights=None, num_classes=10)
    swapped.load_state_dict(plain.state_dict())
    convext.swap(swapped)
    x, target = torch.randn(2, 3, 64, 64), torch.tensor([1, 7])
    optimizer = torch.optim.SGD(swapped.parameters(), lr=0.01)
    with convext.backend("native"), torch.profiler.profile() as profile:
        swapped.eval()
        with torch.no_grad():
            inferred = swapped(x)
        inference = count_native()
        swapped.train()
        torch.manual_seed(1)  # MobileNetV2 has a dropout
        loss = torch.nn.functional.cross_entropy(swapped(x), target)
        loss.backward()
        optimizer.step()
    assert not profiled_convolutions(profile)

    def calls(counts, pass_):
        return sum(n for (ran, _), n in counts.items() if ran == pass_)

    layers = NETWORKS[name]
    assert calls(inference, "fprop") == layers
    ran = count_native()
    assert calls(ran, "fprop") == 2 * layers  # inference and training
    assert calls(ran, "wgrad") == layers
    assert calls(ran, "dgrad") == layers - 1  # the image needs no gradient

    plain.eval()
    with torch.no_grad():
        expected = plain(x)
    torch.testing.assert_close(inferred, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    plain.train()
    torch.manual_seed(1)
    expected = torch.nn.functional.cross_entropy(plain(x), target)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)

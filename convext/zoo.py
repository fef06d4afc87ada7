"""The networks that the demo, the benchmarks and the reports speak of: torchvision's, by name.

Weights are the pretrained ones where they lie in torch's cache or can be downloaded, otherwise seeded ones whose batch
norms have seen data, so that activations have the scale of a trained network's.
"""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .options import OptionError

# Name -> height and width of its usual input.
SIZES = {
    "resnet18": 224,
    "resnet50": 224,
    "mobilenet_v2": 224,
    "mobilenet_v3_large": 224,
    "efficientnet_b0": 224,
    "convnext_tiny": 224,
    "deeplabv3_resnet50": 256,
}
SEED = 2024
DOWNLOAD_TIMEOUT = 3.0  # seconds of silence from the server after which seeded weights do


def check(name: str) -> None:
    """Raises `OptionError` for a network that torchvision does not have."""
    import torchvision

    if name not in torchvision.models.list_models():
        raise OptionError("model", name, f"a network of torchvision's, such as {', '.join(SIZES)}")


def build(name: str, *, pretrained: bool = False, seed: int = SEED) -> tuple[nn.Module, str]:
    """The network `name` in eval mode, float32 on the CPU, and one phrase that says where its weights come from.

    Raises `OptionError` for a name that torchvision does not have.
    """
    import torchvision

    check(name)
    weights = torchvision.models.get_model_weights(name).DEFAULT if pretrained else None
    state = _pretrained_state(weights.url) if weights else None
    arguments = {"weights": None}
    if name.startswith(("deeplabv3", "fcn", "lraspp")):
        arguments["weights_backbone"] = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = torchvision.models.get_model(name, **arguments)
        if state is None:
            _calibrate(model, sample(name, 2, seed=seed))
    if state is None:
        return model.eval(), f"seeded weights (seed {seed})"
    model.load_state_dict(state)
    return model.eval(), f"pretrained weights ({weights})"


def sample(name: str, batch: int, *, size: int | None = None, seed: int = SEED) -> torch.Tensor:
    """(batch, 3, size, size) float32 standard normal numbers, the same at every call; `size` defaults to the usual."""
    size = size or SIZES.get(name, 224)
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed), device="cpu")


def tensor_of(output: torch.Tensor | Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The main tensor of what a network returned: torchvision's segmentation networks return {"out": ...}."""
    return output if isinstance(output, torch.Tensor) else output["out"]


def _pretrained_state(url: str) -> dict[str, Any] | None:
    cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    with _socket_timeout(DOWNLOAD_TIMEOUT):
        try:
            if not cached.exists():
                urllib.request.urlopen(url).close()
            return torch.hub.load_state_dict_from_url(url, map_location="cpu", progress=False, check_hash=True)
        except (OSError, RuntimeError):  # no network, or a file whose hash is wrong
            return None


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@torch.no_grad()
def _calibrate(model: nn.Module, x: torch.Tensor) -> None:
    """Sets every batch norm's running statistics to those of `x`, by one pass in training mode."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None
    model.train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.zero_()

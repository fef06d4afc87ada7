"""The networks that the demo, the benchmarks and the reports speak of: torchvision's, by name, and timm's as timm/NAME.

Weights are the pretrained ones where they lie in torch's cache or can be downloaded, otherwise seeded ones whose batch
norms have seen data, so that activations have the scale of a trained network's.
"""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
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


_OTHER_SIZES = {"inception_v3": 299, "ssd300_vgg16": 300, "ssdlite320_mobilenet_v3_large": 320}
TIMM = "timm/"
DETECTION = ("fasterrcnn", "fcos", "keypointrcnn", "maskrcnn", "retinanet", "ssd")  # take images of any sizes


def check(name: str) -> None:
    """Raises `OptionError` for a network that torchvision, or timm, does not have."""
    if name.startswith(TIMM):
        if find_spec("timm") is None:
            raise OptionError("model", name, "timm to be installed: pip install timm")
        import timm

        known = name.removeprefix(TIMM) in timm.list_models()
    else:
        import torchvision

        known = name in torchvision.models.list_models()
    if not known:
        raise OptionError("model", name, f"a network of torchvision's, such as {', '.join(SIZES)}, or timm/NAME")


def build(name: str, *, pretrained: bool = False, seed: int = SEED, calibrated: bool = True) -> tuple[nn.Module, str]:
    """The network `name` in eval mode, float32 on the CPU, and one phrase that says where its weights come from.
    timm's are seeded, whatever `pretrained` says. `calibrated` False: the batch norms of seeded weights have seen
    nothing, for those who only want the layers.

    Raises `OptionError` for a name that neither torchvision nor timm has.
    """
    check(name)
    weights = state = None
    if pretrained and not name.startswith(TIMM):
        import torchvision

        weights = torchvision.models.get_model_weights(name).DEFAULT
        state = _pretrained_state(weights.url)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _architecture(name)
        if state is None and calibrated and not name.startswith(DETECTION):  # in training those want boxes
            _calibrate(model, sample(name, 2, seed=seed))
    if state is None:
        return model.eval(), f"seeded weights (seed {seed})"
    model.load_state_dict(state)
    return model.eval(), f"pretrained weights ({weights})"


def _architecture(name: str) -> nn.Module:
    model: nn.Module
    if name.startswith(TIMM):
        import timm

        model = timm.create_model(name.removeprefix(TIMM))
    else:
        import torchvision

        arguments = {"weights": None}
        if name.startswith(("deeplabv3", "fcn", "lraspp", *DETECTION)):
            arguments["weights_backbone"] = None
        model = torchvision.models.get_model(name, **arguments)
    return model


def sample(name: str, batch: int, *, size: int | None = None, seed: int = SEED) -> torch.Tensor:
    """(batch, 3, size, size) float32 standard normal numbers, the same at every call; `size` defaults to the usual."""
    if size is None and name.startswith(TIMM):
        import timm

        cfg = timm.get_pretrained_cfg(name.removeprefix(TIMM), allow_unregistered=True)
        size = cfg.input_size[-1] if cfg is not None else None
    size = size or {**SIZES, **_OTHER_SIZES}.get(name, 224)
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

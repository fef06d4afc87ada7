"""How much of the networks that people have convext serves: torchvision's, and one of each family of timm's."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import convext

from .. import zoo
from . import agreement
from .kernelbench import BASELINE, FLOAT64_FACTOR, OURS
from .tables import Grid
from .timing import Timing, interleave

# Of each family one of the smallest.
TORCHVISION = """alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t
mnasnet0_5 mobilenet_v2 mobilenet_v3_small mobilenet_v3_large regnet_x_400mf regnet_y_400mf resnet18 resnet50
resnext50_32x4d wide_resnet50_2 shufflenet_v2_x0_5 squeezenet1_1 swin_t swin_v2_t vgg11 vgg11_bn vit_b_32
deeplabv3_mobilenet_v3_large deeplabv3_resnet50 fcn_resnet50 lraspp_mobilenet_v3_large
fasterrcnn_mobilenet_v3_large_320_fpn fcos_resnet50_fpn keypointrcnn_resnet50_fpn maskrcnn_resnet50_fpn
retinanet_resnet50_fpn ssd300_vgg16 ssdlite320_mobilenet_v3_large""".split()
TIMM = [
    zoo.TIMM + name
    for name in """eca_halonext26ts mobileone_s0 coat_tiny convmixer_1024_20_ks9_p14 convnext_atto cpubone_nano csatv2
cs3darknet_s cspnext_tiny davit_tiny dla46x_c dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0 tinynet_d
efficientnet_b0 mobilenetv2_100 mobilenetv4_conv_small efficientvim_m1 efficientvit_b0 efficientvit_m0 fasternet_t0
fastvit_t8 focalnet_tiny_srf gcvit_xxtiny ghostnet_050 hardcorenas_b hgnetv2_b0 hrnet_w18_small iformer_t
inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_128s lowformer_b0 mambaout_femto
maxvit_pico_rw_256 caformer_s18 mobilenetv3_small_050 mobilevit_xxs mvitv2_tiny nest_tiny nextvit_small nf_regnet_b0
pit_xs_224 pvt_v2_b0 rdnet_tiny regnetx_002 repghostnet_050 repvgg_a0 repvit_m0_9 res2next50 resnest26d resnetv2_18
rexnet_150 selecsls42 legacy_seresnet18 shvit_s1 skresnet18 starnet_s050 swiftformer_xs tiny_vit_5m_224 tresnet_m
twins_svt_small visformer_tiny vit_tiny_patch16_224 vitamin_small_224 volo_d1_224 ese_vovnet19b_slim legacy_xception
xception41p xcit_nano_12_p8_224""".split()
]


@dataclass
class Outcome:
    """What one network gave.

    layers: its convolutions; native: those that convext's kernels ran; fused: those that ran with what follows. far:
    ||result - float64|| / ||float64|| of eager and convext. error: why there is no figure, else "".
    """

    network: str
    layers: int = 0
    native: int = 0
    fused: int = 0
    far: dict[str, float] = field(default_factory=dict)
    timings: dict[str, Timing] = field(default_factory=dict)
    error: str = ""

    @property
    def ok(self) -> bool:
        """As near to float64 as eager is, but for a factor that two right results may differ by."""
        return not self.error and self.far[OURS] <= FLOAT64_FACTOR * self.far[BASELINE]

    @property
    def speed_up(self) -> float | None:
        """How many times as fast as eager, or None where neither was timed."""
        return self.timings[OURS].times_faster_than(self.timings[BASELINE]) if self.timings else None

    def as_json(self) -> dict[str, Any]:
        kept = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "timings"}
        seconds = {name: {"median_s": t.median, "iqr_s": t.iqr} for name, t in self.timings.items()}
        return kept | {"ok": self.ok, "seconds": seconds, "times_eager": self.speed_up}


def run(network: str, seconds: float = 0.0) -> Outcome:
    """Runs a network in evaluation, batch 1, float32, unswapped and swapped, beside float64; and times both in turns
    for about `seconds`, 0 for not at all. What raises is told in `Outcome.error`."""
    outcome = Outcome(network)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _run(outcome, seconds)
    except Exception as error:
        outcome.error = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    return outcome


def _run(outcome: Outcome, seconds: float) -> None:
    eager, _ = zoo.build(outcome.network)
    x = zoo.sample(outcome.network, 1)
    ours = convext.swap(copy.deepcopy(eager))
    detects = outcome.network.startswith(zoo.DETECTION)
    # Boxes are sorted by scores and cut off, so that rounding may give others: what they are made of is compared.
    part: Callable[[nn.Module], Any] = (lambda model: model.backbone) if detects else lambda model: model
    found = {name: _values(part(model)(x)) for name, model in ((BASELINE, eager), (OURS, ours))}
    exact = _values(part(copy.deepcopy(eager).double())(x.double()))
    outcome.far = {name: agreement.distance(values, exact) for name, values in found.items()}
    inputs = [x[0]] if detects else x
    ours(inputs)
    rows = convext.report(ours)
    outcome.layers = len(rows)
    outcome.native = sum(row.backend.startswith(("native", "triton")) for row in rows)
    outcome.fused = sum(bool(row.fused) for row in rows)
    if seconds:
        calls = {BASELINE: lambda: eager(inputs), OURS: lambda: ours(inputs)}
        outcome.timings = interleave(calls, seconds=seconds, min_rounds=3)


def _values(result: Any) -> torch.Tensor:
    return torch.cat([leaf.double().flatten() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)])


def table(outcomes: Sequence[Outcome]) -> Grid:
    columns = ["network", "convolutions", "native", "fused", "eager's error", "convext's", "× eager"]
    grid = Grid(columns)
    for outcome in outcomes:
        if outcome.error:
            grid.rows.append([outcome.network, outcome.error, *[""] * (len(columns) - 2)])
            continue
        gain = outcome.speed_up
        grid.rows.append(
            [outcome.network, str(outcome.layers), str(outcome.native), str(outcome.fused)]
            + [f"{outcome.far[BASELINE]:.0e}", f"{outcome.far[OURS]:.0e}" + ("" if outcome.ok else " WRONG")]
            + ["–" if gain is None else f"{gain:.2f}"]
        )
    return grid


def summary(outcomes: Sequence[Outcome]) -> str:
    """One line: right ones, and of how many convolutions convext's kernels ran."""
    here = [outcome for outcome in outcomes if not outcome.error]
    layers, native, fused = (sum(getattr(outcome, name) for outcome in here) for name in ("layers", "native", "fused"))
    share = f", {native / layers:.1%} of {layers} convolutions native, {fused} fused" if layers else ""
    return f"{sum(outcome.ok for outcome in outcomes)} of {len(outcomes)} networks right{share}"

"""Inference: the engines that swapped networks are measured against, each as a function that prepares a contender.

A peer gets the unswapped network (its own copy, in the run's dtype), a sample input and the number of threads, and
returns a contender that runs the network on that sample. It raises `Skipped` with the reason where it cannot run here.
"""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ..zoo import tensor_of
from .candidate import Candidate, Skipped


def prepare(model: nn.Module, x: torch.Tensor) -> Candidate:
    """`model` on `x` as PyTorch runs it, without gradients."""
    model.eval()

    def call() -> torch.Tensor:
        with torch.no_grad():
            return tensor_of(model(x))

    return Candidate(call, lambda: call().clone())


def channels_last(model: nn.Module, x: torch.Tensor, threads: int) -> Candidate:
    return prepare(model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last))


def compiled(model: nn.Module, x: torch.Tensor, threads: int) -> Candidate:
    return _compiled(model, x, freezing=False)


def compiled_freezing(model: nn.Module, x: torch.Tensor, threads: int) -> Candidate:
    return _compiled(model, x, freezing=True)


def _compiled(model: nn.Module, x: torch.Tensor, freezing: bool) -> Candidate:
    import torch._inductor.config as inductor

    # Freezing is asked for twice: Dynamo reads the global setting while it traces, and the option makes this backend
    # unequal to the other one, without which Dynamo would reuse code that it compiled for another copy of the network.
    candidate = prepare(torch.compile(model.eval(), options={"freezing": freezing}), x)
    with inductor.patch(freezing=freezing), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            candidate.call()
        except Exception as error:
            raise Skipped(f"torch.compile failed: {_first_line(error)}") from error
    return candidate


def onnxruntime(model: nn.Module, x: torch.Tensor, threads: int) -> Candidate:
    if x.dtype not in (torch.float32, torch.float64):
        raise Skipped(f"ONNX Runtime has no {str(x.dtype).removeprefix('torch.')} convolution on the CPU")
    _require("onnx", "onnxruntime")
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # Idle workers must not spin into the turn of the next candidate.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model, (x,), path, dynamo=False, opset_version=17)
        session = ort.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return _of_arrays(lambda: session.run(None, feed)[0])


def openvino(model: nn.Module, x: torch.Tensor, threads: int) -> Candidate:
    _require("openvino")
    import openvino as ov

    if x.dtype not in (torch.float32, torch.bfloat16):
        raise Skipped(f"OpenVINO is asked for float32 and bfloat16 alone, not {str(x.dtype).removeprefix('torch.')}")
    precision = "bf16" if x.dtype == torch.bfloat16 else "f32"
    model, x = model.float(), x.float()  # OpenVINO converts to the precision that it is told
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = ov.convert_model(model, example_input=x, input=[tuple(x.shape)])
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision, "NUM_STREAMS": 1}
    request = ov.Core().compile_model(converted, "CPU", settings).create_infer_request()
    feed = x.numpy()
    return _of_arrays(lambda: next(iter(request.infer([feed], share_inputs=True, share_outputs=True).values())))


PEERS: dict[str, Callable[[nn.Module, torch.Tensor, int], Candidate]] = {
    "eager channels-last": channels_last,
    "torch.compile": compiled,
    "torch.compile, freezing": compiled_freezing,
    "ONNX Runtime": onnxruntime,
    "OpenVINO": openvino,
}


def _of_arrays(call: Callable[[], object]) -> Candidate:
    return Candidate(call, lambda: torch.from_numpy(call()).clone())


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise Skipped(f"{', '.join(missing)} not installed (extra `bench`)")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:100]

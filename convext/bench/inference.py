"""Inference: the engines that swapped networks are measured against, each as a function that prepares a contender.

A peer gets the unswapped network (its own copy, in the run's dtype), a sample input and the number of threads, and
returns a contender that runs the network on that sample. It raises `Skipped` with the reason where it cannot run here.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    return _compiled(model, x, freezing=False, options={"freezing": False})


def compiled_freezing(model: nn.Module, x: torch.Tensor, threads: int) -> Candidate:
    return _compiled(model, x, freezing=True, options={"freezing": True})


def compiled_max_autotune(model: nn.Module, x: torch.Tensor, threads: int) -> Candidate:
    return _compiled(model, x, freezing=True, options={"freezing": True, "max_autotune": True})


def zentorch(model: nn.Module, x: torch.Tensor, threads: int) -> Candidate:
    """AMD's plugin, a backend of torch.compile; each release is built for one of torch."""
    _require("zentorch", "deprecated", "safetensors")
    own, wanted = torch.__version__.split("+")[0], importlib.metadata.version("zentorch")
    if own.split(".")[:2] != wanted.split(".")[:2]:
        raise Skipped(f"zentorch {wanted} is for torch {'.'.join(wanted.split('.')[:2])}, this is torch {own}")
    importlib.import_module("zentorch")
    return _compiled(model, x, freezing=True, backend="zentorch")


def _compiled(model: nn.Module, x: torch.Tensor, freezing: bool, **how) -> Candidate:
    import torch._inductor.config as inductor

    # Freezing is asked for twice: Dynamo reads the global setting while it traces, and the option makes this backend
    # unequal to the other ones, without which Dynamo would reuse code that it compiled for another copy of the network.
    candidate = prepare(torch.compile(model.eval(), **how), x)
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
    with _exported_onnx(model, x) as path:
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


def ncnn(model: nn.Module, x: torch.Tensor, threads: int) -> Candidate:
    """It has no batch: images run one by one, within one call. Half precision is off, in the file and in the run."""
    _only_float32("ncnn", x)
    _require("ncnn", "pnnx")
    import ncnn as engine
    import numpy
    import pnnx

    net = engine.Net()
    net.opt.num_threads = threads
    for name in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage"):
        setattr(net.opt, f"use_{name}", False)
    with tempfile.TemporaryDirectory() as folder:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.trace(_OneTensor(model), x[:1]).save(f"{folder}/model.pt")
        shape = ",".join(map(str, (1, *x.shape[1:])))
        _run([pnnx.EXEC_PATH, "model.pt", f"inputshape=[{shape}]f32", "fp16=0"], folder)
        if net.load_param(f"{folder}/model.ncnn.param") or net.load_model(f"{folder}/model.ncnn.bin"):
            raise Skipped("ncnn does not load what pnnx made of the network")
    (given,), (wanted,) = net.input_names(), net.output_names()
    images = [image.numpy() for image in x]

    def call() -> numpy.ndarray:
        results = []
        for image in images:
            extractor = net.create_extractor()
            extractor.input(given, engine.Mat(image))
            results.append(numpy.array(extractor.extract(wanted)[1]))
        return numpy.stack(results)

    return _of_arrays(call)


def mnn(model: nn.Module, x: torch.Tensor, threads: int) -> Candidate:
    """From ONNX, its input in NCHW; "high" precision is float32."""
    _only_float32("MNN", x)
    _require("onnx", "MNN")
    with _exported_onnx(_OneTensor(model), x) as path:
        # Its own program (MNN.tools.mnnconvert) installs packages; the module below it does not.
        convert = "import sys, MNN, _tools; _tools.mnnconvert(sys.argv)"
        names = ["--modelFile", path.name, "--MNNModel", "model.mnn", "--bizCode", "convext"]
        _run([sys.executable, "-c", convert, "-f", "ONNX", *names], str(path.parent))
        import MNN.expr as expr
        import MNN.nn as engine

        setting = {"backend": 0, "precision": "high", "numThread": threads}
        manager = engine.create_runtime_manager((setting,))
        net = engine.load_module_from_file(f"{path.parent}/model.mnn", [], [], runtime_manager=manager)
    given = expr.placeholder(list(x.shape), expr.NCHW)
    given.write(x.numpy())

    def call():
        (found,) = net.forward([given])
        return (expr.convert(found, expr.NCHW) if len(found.shape) == 4 else found).read()

    return _of_arrays(call)


def executorch(model: nn.Module, x: torch.Tensor, threads: int) -> Candidate:
    """Through XNNPACK."""
    _only_float32("ExecuTorch", x)
    _require("executorch")
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(_OneTensor(model), (x,))
        lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    portable_lib._unsafe_reset_threadpool(threads)
    buffer = lowered.to_executorch().buffer
    program = Runtime.get().load_program(buffer)
    # A method points into both, and holds neither.
    held = (buffer, program, program.load_method("forward"))

    def call() -> torch.Tensor:
        return held[-1].execute([x])[0]

    return Candidate(call, lambda: call().clone())


PEERS: dict[str, Callable[[nn.Module, torch.Tensor, int], Candidate]] = {
    "eager channels-last": channels_last,
    "torch.compile": compiled,
    "torch.compile, freezing": compiled_freezing,
    "torch.compile, max-autotune": compiled_max_autotune,
    "ONNX Runtime": onnxruntime,
    "OpenVINO": openvino,
    "zentorch": zentorch,
    "ncnn": ncnn,
    "MNN": mnn,
    "ExecuTorch": executorch,
}


def _of_arrays(call: Callable[[], object]) -> Candidate:
    return Candidate(call, lambda: torch.from_numpy(call()).clone())


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise Skipped(f"{', '.join(missing)} not installed: pip install {' '.join(packages)}")


def _only_float32(engine: str, x: torch.Tensor) -> None:
    if x.dtype != torch.float32:
        raise Skipped(f"{engine} is asked for float32 alone, not {str(x.dtype).removeprefix('torch.')}")


class _OneTensor(nn.Module):
    """The network, with the main tensor of its output alone."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return tensor_of(self.model(x))


@contextmanager
def _exported_onnx(model: nn.Module, x: torch.Tensor) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model, (x,), path, dynamo=False, opset_version=17)
        yield path


def _run(command: list[str], folder: str) -> None:
    """A converter, in a folder. Raises Skipped with the last line of what it says where it fails."""
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if ran.returncode:
        last = (ran.stderr.strip() or ran.stdout.strip() or "it said nothing").splitlines()[-1]
        raise Skipped(f"its converter failed with status {ran.returncode}: {last[:100]}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:100]

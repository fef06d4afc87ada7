"""What Inductor would write for a GPU that is not there, and what Triton makes of the kernels in it.

Inductor copies the source of every Triton kernel that it finds in a graph, and of what that calls, into the module that
it generates. Whether such a copy stands on its own shows only when it is compiled. Inductor asks for a GPU's properties
on its way; they are given by hand. All of this is PyTorch's inside, and of the release that the tests run with.
"""

import contextlib
import importlib.util
import re
from types import SimpleNamespace
from unittest import mock

import triton
from torch._inductor.runtime import triton_heuristics
from torch._inductor.runtime.hints import DeviceProperties
from triton.compiler import ASTSource

H100 = {"multi_processor_count": 132, "major": 9, "regs_per_multiprocessor": 65536,
        "max_threads_per_multi_processor": 2048, "warp_size": 32}  # fmt: skip


@contextlib.contextmanager
def paper_gpu():
    """A GPU as far as Inductor looks while it writes."""
    properties = SimpleNamespace(**H100, minor=0, name="on paper", total_memory=1 << 36, L2_cache_size=50 << 20)
    described = DeviceProperties(type="cuda", index=0, cc=90, **H100)
    with contextlib.ExitStack() as stack:
        for name, value in {
            "torch.cuda.get_device_properties": lambda device=None: properties,
            "torch.cuda.get_device_capability": lambda device=None: (9, 0),
            "torch.cuda.is_available": lambda: True,
            "torch.cuda.current_device": lambda: 0,
            "torch.cuda.device_count": lambda: 1,
            "torch._inductor.scheduler.has_triton": lambda: True,
        }.items():
            stack.enter_context(mock.patch(name, value))
        stack.enter_context(mock.patch.object(DeviceProperties, "create", lambda device: described))
        yield


def written(graph, inputs, fake_mode) -> str:
    """The module that Inductor writes for a functional graph of AOTAutograd's."""
    from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    with paper_gpu(), V.set_fake_mode(fake_mode), V.set_debug_handler(mock.MagicMock()):
        view_to_reshape(graph)
        post_grad_passes(graph, True)
        lowering = GraphLowering(graph, example_inputs=inputs)
        with V.set_graph_handler(lowering):
            lowering.run(*inputs)
            code, _ = lowering.codegen()
    return code.value


def compile_kernels(module: str, target, folder) -> list[str]:
    """Compiles every kernel of convext's that the module holds, from the module alone; their names."""
    names = []
    pattern = r"^(\w+) = async_compile\.triton\('\w+', '''(.*?)'''"
    for label, source in re.findall(pattern, module, re.S | re.M):
        if "user_autotune" not in source:
            continue
        kernel, meta, config = _loaded(folder / f"{label}.py", source)
        warps, stages = config.pop("num_warps"), config.pop("num_stages")
        signature = meta["signature"]
        constants = dict.fromkeys(name for name, kind in signature.items() if kind == "constexpr")
        constants |= meta["constants"] | {name: value for name, value in config.items() if name in kernel.arg_names}
        positions = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        options = {"num_warps": warps, "num_stages": stages}
        triton.compile(ASTSource(kernel, signature, positions), target=target, options=options)
        names.append(kernel.fn.__name__)
    return names


def _loaded(path, source):
    """The kernel of a generated source with its signature and its configuration."""
    seen = {}

    def user_autotune(configs, inductor_meta, triton_meta, filename, custom_kernel):
        def keep(kernel):
            seen.update(kernel=kernel, meta=triton_meta, config=dict(configs[0]))
            return kernel

        return keep

    path.write_text(source)
    with (
        mock.patch.object(triton_heuristics, "user_autotune", user_autotune),
        mock.patch("torch._inductor.runtime.triton_helpers.set_driver_to_gpu", lambda: None),
    ):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return seen["kernel"], seen["meta"], seen["config"]

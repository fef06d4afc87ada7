"""Compiles what a `Launch` would launch, for a GPU that is not there, and says what came out."""

import contextlib
import dataclasses
import re
import subprocess
import tempfile
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from convext.triton import launch as launching

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Shared memory that one program may have, bytes: CUDA's and AMD's documents.
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}


@dataclasses.dataclass
class Compiled:
    assembly: str  # PTX or amdgcn
    shared: int  # bytes
    spills: bool  # registers to memory
    spills_in_loop: bool  # and in an innermost loop, where it costs

    def instructions(self, pattern):
        return set(re.findall(pattern, self.assembly))


@contextlib.contextmanager
def aiming_at(name, tf32=False):
    """Launches built inside are meant for that target, whichever device their tensors are on."""
    backend = TARGETS[name].backend
    with (
        mock.patch.object(launching, "target", lambda device_type: backend),
        torch.backends.cudnn.flags(allow_tf32=tf32),
    ):
        yield


def compiled(launch, config, target):
    arguments = {**launch.arguments, **config.kwargs}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = arguments.pop(parameter.name)
        specialise = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialise and type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[i,] = value
            continue
        signature[parameter.name] = triton.runtime.jit.mangle_type(value)
        if specialise and (isinstance(value, torch.Tensor) or value % 16 == 0):
            attributes[i,] = [["tt.divisibility", 16]]
    assert not arguments, f"the kernel has no parameters {sorted(arguments)}"
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    result = triton.compile(source, target=TARGETS[target], options=options)
    if target == "gfx942":
        assembly = result.asm["amdgcn"]
        spills = spills_in_loop = any(int(count) for count in re.findall(r"gpr_spill_count:\s+(\d+)", assembly))
    else:
        assembly = result.asm["ptx"]
        spills, spills_in_loop = spilled(result.asm["cubin"])
    return Compiled(assembly, result.metadata.shared, spills, spills_in_loop)


def spilled(cubin):
    """Whether a kernel uses local memory, which is where spilled registers go, and whether in an innermost loop."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(what):
            command = [triton.knobs.nvidia.cuobjdump.path, what, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        if not any(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", dump("-res-usage"))):
            return False, False
        return True, spills_in_innermost_loop(dump("-sass"))


def spills_in_innermost_loop(sass):
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass)]
    jumps = [(at, re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)) for at, text in code]
    loops = [(int(jump[1], 16), at) for at, jump in jumps if jump and int(jump[1], 16) < at]
    innermost = [(a, b) for a, b in loops if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)]
    spills = [at for at, text in code if re.search(r"\b(LDL|STL)\b", text)]
    assert spills, "there is a stack, and nothing is kept on it"
    return any(a <= at <= b for at in spills for a, b in innermost)

"""PTX, read: a module's kernels as lists of instructions. What they do is in ptx_instructions.py, who runs them in
ptx_machine.py. All of it is written from the PTX ISA's text, and shares nothing with the emulator in
csrc/tests/cuda_on_cpu: what g++ makes of a kernel's source and what nvcc makes of it are compared through two readings.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from functools import cached_property

# Types that instructions name.
BITS = {f"{kind}{bits}": bits for kind in "bus" for bits in (8, 16, 32, 64)}
BITS |= {"pred": 1, "f16": 16, "f32": 32, "f64": 64, "bf16": 16, "f16x2": 32, "bf16x2": 32, "tf32": 32}


# Where the windows of generic addresses lie, far from what a host hands out.
SHARED_WINDOW, LOCAL_WINDOW, PARAM_WINDOW = 1 << 60, 2 << 60, 3 << 60


class PtxError(Exception):
    """What the text asks for and cannot be done, with its line."""


# ---- operands


@dataclass(frozen=True)
class Register:
    name: str  # unique in a kernel, whatever its scope
    bits: int  # 1 is a predicate
    negated: bool = False


@dataclass(frozen=True)
class Special:
    """%tid.x and the like."""

    name: str


@dataclass(frozen=True)
class Immediate:
    bits: int  # the pattern, of 64 bits
    is_float: int = 0  # 32 or 64, where it was written as 0f... or 0d...


@dataclass(frozen=True)
class Symbol:
    """A label, a parameter, or a variable in some memory."""

    name: str


@dataclass(frozen=True)
class Address:
    base: Register | Symbol | Immediate
    offset: int


@dataclass(frozen=True)
class Vector:
    items: tuple


@dataclass(frozen=True)
class Pair:
    """d|p."""

    first: object
    second: object


@dataclass
class Instruction:
    line: int
    text: str
    opcode: list[str]  # parted at the dots
    operands: list
    guard: Register | None = None

    @property
    def types(self) -> list[str]:
        return [part for part in self.opcode[1:] if part in BITS]

    def error(self, why: str) -> PtxError:
        return PtxError(f"line {self.line}: {self.text}: {why}")


@dataclass
class Parameter:
    name: str
    offset: int
    bytes: int


@dataclass
class Variable:
    space: str  # shared, local, global, const
    bytes: int  # 0: as many as the launch brings
    align: int


@dataclass
class Kernel:
    name: str
    parameters: list[Parameter]
    instructions: list[Instruction]
    labels: dict[str, int]  # -> index of the instruction behind it
    tables: dict[str, list[str]]  # .branchtargets
    registers: dict[str, int]  # -> bits
    variables: dict[str, Variable]

    @cached_property
    def parameter_bytes(self) -> int:
        return max((p.offset + p.bytes for p in self.parameters), default=0)


# ---- reading

_TOKEN = r"[\w$%]+"
_LABEL = re.compile(rf"\s*({_TOKEN})\s*:(?!:)")
_DIRECTIVES = (".pragma",)


class Module:
    def __init__(self, text: str):
        self._text = _without_comments(text)
        self.variables = dict(filter(None, map(_variable, self._outside().split(";"))))
        self._kernels: dict[str, Kernel] = {}

    def _outside(self) -> str:
        """What lies outside of every function."""
        kept, depth = [], 0
        for part in re.split(r"([{}])", self._text):
            depth += {"{": 1, "}": -1}.get(part, 0)
            if depth == 0:
                kept.append(part if part not in "{}" else ";")
        return "".join(kept)

    @cached_property
    def names(self) -> list[str]:
        return re.findall(rf"\.entry\s+({_TOKEN})", self._text)

    def kernel(self, name: str) -> Kernel:
        if name not in self._kernels:
            found = re.search(rf"\.entry\s+{re.escape(name)}\s*\(", self._text)
            if found is None:
                raise PtxError(f"no kernel is named {name}")
            close = self._text.index(")", found.end())
            parameters = _parameters(self._text[found.end() : close])
            start = self._text.index("{", close)
            self._kernels[name] = _Body(self, name, parameters, start).kernel
        return self._kernels[name]

    @cached_property
    def by_signature(self) -> dict[str, str]:
        """Demangled -> name. A namespace without a name, which compilers mangle each in its way, is the same in all."""
        return dict(zip(demangled(self.names), self.names))


def demangled(names: list[str]) -> list[str]:
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def _without_comments(text: str) -> str:
    """As many lines as before."""
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
    return re.sub(r"//[^\n]*", "", text)


def _variable(statement: str) -> tuple[str, Variable] | None:
    found = re.search(
        rf"\.(shared|local|global|const)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+({_TOKEN})\s*(?:\[(\d*)\])?\s*(=)?",
        statement,
    )
    if found is None:
        return None
    space, align, kind, name, count, value = found.groups()
    if value:
        raise PtxError(f"{name}: variables with an initial value are not known here")
    each = BITS[kind] // 8
    size = each if count is None else each * int(count or 0)
    return name, Variable(space, size, int(align or each))


def _parameters(text: str) -> list[Parameter]:
    found, at = [], 0
    for line in filter(str.strip, text.split(",")):
        align = re.search(r"\.align\s+(\d+)", line)
        kind = next(k for k in re.findall(r"\.(\w+)", line) if k in BITS)
        name, count = re.search(rf"({_TOKEN})\s*(?:\[(\d+)\])?\s*$", line).groups()
        size = BITS[kind] // 8 * int(count or 1)
        # `.ptr .align` speaks of what is pointed at.
        own = int(align[1]) if align and ".ptr" not in line else BITS[kind] // 8
        at = (at + own - 1) // own * own
        found.append(Parameter(name, at, size))
        at += size
    return found


class _Body:
    """A kernel's statements. Braces open a scope with registers of its own, as inline assembly does."""

    def __init__(self, module: Module, name: str, parameters: list[Parameter], start: int):
        self.kernel = Kernel(name, parameters, [], {}, {}, {}, dict(module.variables))
        self._scopes: list[dict[str, Register]] = []
        self._ranges: list[list[tuple[str, int, int]]] = []  # %r<100>: prefix, count, bits
        text, at = module._text, start
        line = text.count("\n", 0, start) + 1
        while True:
            skipped = re.compile(r"\s*").match(text, at).end()
            line += text.count("\n", at, skipped)
            at = skipped
            if text[at] == "{":
                self._scopes.append({}), self._ranges.append([])
                at += 1
            elif text[at] == "}":
                self._scopes.pop(), self._ranges.pop()
                at += 1
                if not self._scopes:
                    break
            elif label := _LABEL.match(text, at):
                self.kernel.labels[label[1]] = len(self.kernel.instructions)
                self._last_label = label[1]
                line += text.count("\n", at, label.end())
                at = label.end()
            else:
                end = text.index(";", at)
                self._statement(text[at:end].strip(), line)
                line += text.count("\n", at, end)
                at = end + 1

    def _statement(self, text: str, line: int) -> None:
        text = re.sub(r"\s+", " ", text)
        if not text or text.split(" ")[0] in _DIRECTIVES:
            return
        if text.startswith(".reg"):
            self._declare(text)
        elif text.startswith(".branchtargets"):
            self.kernel.tables[self._last_label] = [name.strip() for name in text.split(" ", 1)[1].split(",")]
        elif variable := _variable(text):
            self.kernel.variables[variable[0]] = variable[1]
        elif text.startswith("."):
            raise PtxError(f"line {line}: {text}: this directive is not known here")
        else:
            self.kernel.instructions.append(self._instruction(text, line))

    def _declare(self, text: str) -> None:
        kind, names = re.match(r"\.reg (?:\.v\d )?\.(\w+) (.*)", text).groups()
        for name in map(str.strip, names.split(",")):
            if many := re.fullmatch(r"(.*)<(\d+)>", name):
                self._ranges[-1].append((many[1], int(many[2]), BITS[kind]))
            else:
                self._scopes[-1][name] = self._new(name, BITS[kind])

    def _new(self, name: str, bits: int) -> Register:
        unique = name
        while unique in self.kernel.registers:  # the same name in another scope
            unique += "'"
        self.kernel.registers[unique] = bits
        return Register(unique, bits)

    def _register(self, name: str) -> Register | None:
        for scope, ranges in zip(reversed(self._scopes), reversed(self._ranges)):
            if name in scope:
                return scope[name]
            for prefix, count, bits in ranges:
                if name.startswith(prefix) and name[len(prefix) :].isdigit() and int(name[len(prefix) :]) < count:
                    scope[name] = self._new(name, bits)
                    return scope[name]
        return None

    def _instruction(self, text: str, line: int) -> Instruction:
        found = re.match(r"(?:@(!?)([\w%$]+) )?([\w.:]+) ?(.*)", text)
        if found is None:
            raise PtxError(f"line {line}: {text}: no instruction")
        negated, guard, opcode, rest = found.groups()
        instruction = Instruction(
            line, text, [part for part in re.split(r"\.(?!:)", opcode.replace("::", "_")) if part], []
        )
        if guard:
            register = self._register(guard)
            instruction.guard = Register(register.name, 1, bool(negated))
        try:
            instruction.operands = [self._operand(o) for o in _split(rest)]
        except (ValueError, AttributeError) as error:
            raise instruction.error(f"an operand cannot be read ({error})") from None
        return instruction

    def _operand(self, text: str):
        if text.startswith("["):
            return self._address(text[1:-1])
        if text.startswith("{"):
            return Vector(tuple(self._operand(item) for item in _split(text[1:-1])))
        if "|" in text:
            return Pair(*(self._operand(part.strip()) for part in text.split("|")))
        if text.startswith("!"):
            register = self._register(text[1:])
            return Register(register.name, register.bits, True)
        if register := self._register(text):
            return register
        if text.startswith("%"):
            return Special(text)
        if re.match(r"-?\d", text):
            return _immediate(text)
        return Symbol(text)

    def _address(self, text: str) -> Address:
        base, sign, offset = re.fullmatch(r"([^+-]+?) ?(?:([+-]) ?(\S+))?", text.strip()).groups()
        shift = int(offset, 0) if offset else 0
        return Address(self._operand(base), -shift if sign == "-" else shift)


def _split(text: str) -> list[str]:
    """At the commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "[{(") - (c in "]})")
        if c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [part for part in [*parts, text[start:].strip()] if part]


def _immediate(text: str) -> Immediate:
    if found := re.fullmatch(r"0([fFdD])([0-9A-Fa-f]+)", text):
        return Immediate(int(found[2], 16), 32 if found[1] in "fF" else 64)
    return Immediate(int(text.rstrip("U"), 0) & (1 << 64) - 1)

"""Reads PTX text: its kernels with their parameters, registers, shared variables and instructions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from emulator.errors import Unsupported


@dataclass(frozen=True)
class Register:
    """A register by its name; special ones (%tid.x) too."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A constant: its bits, as many as the instruction takes."""

    value: int


@dataclass(frozen=True)
class Address:
    """[base + offset]; the base is a register, or the name of a parameter or of a shared variable."""

    base: str
    offset: int


@dataclass(frozen=True)
class Symbol:
    """The name of a label or of a shared variable."""

    name: str


@dataclass(frozen=True)
class Vector:
    """{a, b, ...}."""

    parts: tuple[Operand, ...]


Operand = Register | Immediate | Address | Symbol | Vector


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: its dotted parts, ("ld", "global", "v4", "b32").
        operands: as written, the result first; `a|b` counts as two.
        predicate: register that says whether a thread executes it; None = all do.
        negated: whether those execute it for which the predicate is false.
        text, line: where it stands.
    """

    opcode: tuple[str, ...]
    operands: tuple[Operand, ...]
    predicate: str | None
    negated: bool
    text: str
    line: int


@dataclass(frozen=True)
class Parameter:
    """A kernel parameter: bytes, alignment, and where it lies among the others."""

    name: str
    size: int
    alignment: int
    offset: int


@dataclass
class Kernel:
    """An entry of a PTX module.

    Attributes:
        name: mangled.
        parameters: by name, in order.
        shared: offset of every shared variable; shared_bytes: of those with a fixed size.
        exact_threads, most_threads: of a block, as the compiler was told; None = any number.
        registers: bits by name, 1 for predicates.
        code: instructions; labels: index into it, by name.
    """

    name: str
    parameters: dict[str, Parameter]
    shared: dict[str, int]
    shared_bytes: int
    exact_threads: int | None
    most_threads: int | None
    registers: dict[str, int] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    @cached_property
    def parameter_bytes(self) -> int:
        """Bytes of all parameters as they are passed."""
        return max((p.offset + p.size for p in self.parameters.values()), default=0)


_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*(?:\(([^)]*)\))?([^{]*)\{", re.DOTALL)
_ARRAY = re.compile(r"\.param(?:\s+\.align\s+(\d+))?\s+\.b8\s+([\w$]+)\[(\d+)\]")
_SCALAR = re.compile(r"\.param\s+\.[a-z]+(\d+)\b.*?([\w$]+)$", re.DOTALL)
_SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.[a-z]+(\d+)\s+([\w$]+)(?:\[(\d*)\])?\s*;")
_LABEL = re.compile(r"([$\w]+):")
_GUARD = re.compile(r"@(!?)(%[\w$]+)\s+")
_ADDRESS = re.compile(r"\[\s*(%?[\w$]+)\s*(?:\+\s*(-?\d+)\s*)?\]")
_SPACES = re.compile(r"\s+")


def kernels(text: str, only: str | None = None) -> dict[str, Kernel]:
    """Kernels of a module by name.

    Args:
        only: the one that is wanted; None = all.

    Raises:
        Unsupported: something that the machine does not know.
    """
    # comments and debugging lines keep their line's number
    text = re.sub(r"//[^\n]*|^\s*\.(?:loc|file)\b[^\n]*", "", text, flags=re.MULTILINE)
    shared, shared_bytes = _shared_variables(text)
    found = {}
    for entry in _ENTRY.finditer(text):
        name, parameters, head = entry.groups()
        if only not in (None, name):
            continue
        threads = {key: _number(rf"\.{key}\s+(\d+)", head) for key in ("reqntid", "maxntid")}
        kernel = Kernel(
            name, _parameters(parameters or ""), shared, shared_bytes, threads["reqntid"], threads["maxntid"]
        )
        _read_body(kernel, text, entry.end())
        found[name] = kernel
    return found


def _number(pattern: str, text: str) -> int | None:
    found = re.search(pattern, text)
    return int(found[1]) if found else None


def _shared_variables(text: str) -> tuple[dict[str, int], int]:
    """Offsets; variables without a size (Triton's one) share the start."""
    offsets, size = {}, 0
    for align, bits, name, count in _SHARED.findall(text):
        size = -(-size // int(align)) * int(align)
        offsets[name] = size
        size += int(bits) // 8 * int(count or 0)
    return offsets, size


def _parameters(text: str) -> dict[str, Parameter]:
    found, end = {}, 0
    for declaration in filter(None, (part.strip() for part in text.split(","))):
        if array := _ARRAY.search(declaration):
            alignment, name, size = int(array[1] or 1), array[2], int(array[3])
        elif scalar := _SCALAR.search(declaration):
            alignment = size = int(scalar[1]) // 8
            name = scalar[2]
        else:
            raise Unsupported(f"parameter {declaration!r}")
        offset = -(-end // alignment) * alignment
        found[name] = Parameter(name, size, alignment, offset)
        end = offset + size
    return found


def _statements(text: str, start: int) -> Iterator[tuple[str, int]]:
    """(statement or label, its line) up to the brace that closes the body; inner scopes are taken apart."""
    depth, at, line = 1, start, text.count("\n", 0, start) + 1
    while depth:
        space = _SPACES.match(text, at)
        if space:
            line += space[0].count("\n")
            at = space.end()
        if text[at] in "{}":
            depth += 1 if text[at] == "{" else -1
            at += 1
        elif label := _LABEL.match(text, at):
            yield label[0], line
            at = label.end()
        else:
            end = text.index(";", at)
            statement = text[at:end]
            yield statement.strip(), line
            line += statement.count("\n")
            at = end + 1


def _read_body(kernel: Kernel, text: str, start: int) -> None:
    for statement, line in _statements(text, start):
        if statement.endswith(":"):
            kernel.labels[statement[:-1]] = len(kernel.code)
        elif statement.startswith(".reg"):
            _declare(kernel.registers, statement)
        elif not statement.startswith(".") and statement:
            kernel.code.append(_instruction(statement, line))


def _declare(registers: dict[str, int], statement: str) -> None:
    _, kind, names = statement.split(None, 2)
    bits = 1 if kind == ".pred" else int(re.sub(r"\D", "", kind))
    for name in (part.strip() for part in names.split(",")):
        many = re.fullmatch(r"(%?[\w$]+)<(\d+)>", name)
        own = [f"{many[1]}{k}" for k in range(int(many[2]))] if many else [name]
        for each in own:
            if registers.setdefault(each, bits) != bits:
                raise Unsupported(f"register {each} of two widths in inner scopes")


def _instruction(statement: str, line: int) -> Instruction:
    rest, predicate, negated = statement, None, False
    if guard := _GUARD.match(rest):
        negated, predicate, rest = bool(guard[1]), guard[2], rest[guard.end() :]
    opcode, _, arguments = _SPACES.sub(" ", rest).partition(" ")
    operands = tuple(_operand(part) for part in _split(arguments))
    return Instruction(tuple(opcode.replace("::", ".").split(".")), operands, predicate, negated, statement, line)


def _split(arguments: str) -> list[str]:
    """Operands at the outermost level: commas inside of braces do not separate."""
    braced = re.sub(r"\{[^}]*\}", lambda found: found[0].replace(",", "\0"), arguments)
    parts = [part.strip().replace("\0", ",") for part in re.split(r"[,|]", braced)]
    return [part for part in parts if part]


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return Vector(tuple(_operand(part.strip()) for part in text[1:-1].split(",")))
    if text.startswith("["):
        found = _ADDRESS.fullmatch(text)
        if found is None:
            raise Unsupported(f"address {text}")
        return Address(found[1], int(found[2] or 0))
    if text.startswith("%"):
        return Register(text)
    if text[:2] in ("0f", "0F", "0d", "0D"):
        return Immediate(int(text[2:], 16))
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        return Immediate(int(text.rstrip("U"), 0))
    return Symbol(text)

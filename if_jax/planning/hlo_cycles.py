"""What the TPU compiler says a program costs: the cycles it notes at the operations of the program's optimised text.

Of a loop the text holds the body once; how often it runs stands in its condition. Kernels and collectives carry no
estimate: they are counted by name, so that nobody takes the sum for all there is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

_HEAD = re.compile(r"^(ENTRY )?(%[\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?(%[\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|[\s)}\]])([a-z][a-z0-9\-]*)\(")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=(%[\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_CONSTANT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")

# What takes time without an estimate; all else that has none is about single numbers, or hidden behind what computes.
_DEAR = re.compile(
    r"all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast|send|recv"
    r"|convolution|dot|gather|scatter|sort|fft|cholesky|triangular-solve|rng|rng-bit-generator|infeed|outfeed"
)
_FREE_CALLS = frozenset(("ConcatBitcast", "Sharding", "AllocateBuffer", "AssumeGatherIndicesInBound"))
_LAYOUT = re.compile(
    r"copy|transpose|pad|broadcast|concatenate|slice|reshape|bitcast|dynamic-slice|dynamic-update-slice|reverse"
    r"|parameter|constant|convert|maximum|tuple|iota|gather"
)

KINDS = ("convolution", "dense", "attention", "softmax", "norm sums", "layout", "elementwise")


@dataclass(frozen=True)
class Cycles:
    """Cycles of a program on one core."""

    total: int
    by_kind: dict[str, int]  # see `KINDS`
    unestimated: dict[str, int]  # operations without an estimate, by name: how often they run


@dataclass
class _Instruction:
    opcode: str
    cycles: int | None
    op_name: str
    called: list[str]
    target: str = ""
    condition: str = ""


@dataclass
class _Computation:
    instructions: list[_Instruction] = field(default_factory=list)
    constants: list[int] = field(default_factory=list)


def read_cycles(text: str) -> Cycles:
    """Adds up a compiled program's estimates.

    Args:
      text: of `compiled.as_text()`, compiled for a TPU.

    Raises:
      ValueError: it holds no estimates at all: not a TPU's program, or another format.
    """
    computations, entry = _parse(text)
    kinds: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    for instruction, times in _run(computations, entry, 1):
        if instruction.cycles is not None:
            kinds[_kind(instruction, computations)] += instruction.cycles * times
        elif name := _unestimated(instruction):
            unknown[name] += times
    if not kinds:
        raise ValueError("the compiled text holds no estimated_cycles: is it a TPU's, and libtpu one that notes them?")
    by_kind = {kind: kinds[kind] for kind in KINDS if kinds[kind]}
    return Cycles(sum(kinds.values()), by_kind, dict(unknown))


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    entry, current = "", _Computation()
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations.setdefault(head[2], _Computation())
            entry = head[2] if head[1] else entry
        elif match := _INSTRUCTION.match(line):
            current.instructions.append(_read_instruction(match[2]))
            if constant := _CONSTANT.search(line):
                current.constants.append(int(constant[1]))
    if not entry:
        raise ValueError("the compiled text has no ENTRY: not the text of a compiled program")
    return computations, entry


def _read_instruction(text: str) -> _Instruction:
    before = text.split(", metadata=")[0].split(", backend_config=")[0]
    opcode = _OPCODE.search(before)
    cycles, op_name, target = _CYCLES.search(text), _OP_NAME.search(text), _TARGET.search(text)
    called = _CALLED.findall(before)
    if branches := _BRANCHES.search(before):
        called += [name.strip() for name in branches[1].split(",")]
    condition = re.search(r"condition=(%[\w.\-]+)", before)
    return _Instruction(
        opcode[1] if opcode else "",
        int(cycles[1]) if cycles else None,
        op_name[1] if op_name else "",
        called,
        target[1] if target else "",
        condition[1] if condition else "",
    )


def _run(computations: dict[str, _Computation], name: str, times: int) -> Iterator[tuple[_Instruction, int]]:
    """Every instruction that runs, with how often; the insides of a fusion are one instruction."""
    for instruction in computations[name].instructions:
        yield instruction, times
        if instruction.opcode == "while":
            trips = _trips(computations, instruction.condition)
            for called in instruction.called:
                yield from _run(computations, called, times * trips)
        elif instruction.opcode == "conditional":  # one of the branches: the dearest
            runs = [list(_run(computations, called, times)) for called in instruction.called]
            yield from max(runs, key=lambda run: sum((row.cycles or 0) * often for row, often in run), default=[])
        elif instruction.opcode in ("call", "async-start") and instruction.cycles is None:
            for called in instruction.called:
                yield from _run(computations, called, times)


def _trips(computations: dict[str, _Computation], condition: str) -> int:
    """How often a loop runs: the constant that its condition compares its counter with."""
    own = computations[condition]
    inner = [computations[name] for row in own.instructions for name in row.called if name in computations]
    constants = [constant for part in (own, *inner) for constant in part.constants]
    return max(constants, default=1)


def _unestimated(instruction: _Instruction) -> str:
    if instruction.opcode == "custom-call":
        return "" if instruction.target in _FREE_CALLS else instruction.target
    name = instruction.opcode.removesuffix("-start")  # what ends it is the same operation
    return name if _DEAR.fullmatch(name) else ""


def _kind(instruction: _Instruction, computations: dict[str, _Computation]) -> str:
    """What an operation is for, by what is in its fusion and by the names that the network's layers gave it."""
    parts = list(_inside(instruction, computations))
    products = [part for part in parts if part.opcode in ("convolution", "dot")]
    for part in products:
        if "conv_general_dilated" in part.op_name:
            return "convolution"
    for part in products:
        return "attention" if "->" in part.op_name.rsplit("/", 2)[-2] else "dense"
    opcodes = {part.opcode for part in parts}
    if all(map(_LAYOUT.fullmatch, opcodes)):
        return "layout"
    names = instruction.op_name
    if "norm" in names and "reduce" in opcodes:
        return "norm sums"
    if "exponential" in opcodes or re.search(r"Attention\w*\)*/(?:jit\(\w+\)/)?\w+$", names):
        return "softmax"
    return "elementwise"


def _inside(instruction: _Instruction, computations: dict[str, _Computation]) -> Iterator[_Instruction]:
    """The operations of a fusion, fusions in it included; of anything else, itself."""
    if instruction.opcode != "fusion":
        yield instruction
        return
    for name in instruction.called:
        for part in computations[name].instructions:
            yield from _inside(part, computations)

"""What a compiled program moves: read from its HLO text, loops counted.

XLA's own cost analysis counts the body of a loop once, whatever its trip count, and
layers are scanned in a loop. This reader walks the program from its entry, multiplies
by trip counts, and adds up two things per device: bytes that collectives send, and
bytes that pass between the chip and its main memory.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping

import numpy as np

COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
# Instructions that name, forward or reinterpret values without touching memory.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while"),
    *("call", "conditional", "after-all", "partition-id", "replica-id", "domain"),
    *("opt-barrier", "optimization-barrier"),
}
_ARRAY = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,<= ]*)\](\{[^}]*\})?")
_LINE = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO."""

    name: str  # unique in its computation
    opcode: str  # such as ``fusion``
    shape: str  # of its result, as text
    operands: tuple[str, ...]  # names
    arguments: str  # what stands between its parentheses; a constant's value
    rest: str  # attributes, as text
    root: bool  # whether the computation returns it


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes of one run of a program, per device."""

    collectives: dict[str, int]  # bytes sent by kind, over links inside a slice
    # bytes sent by kind, by collectives whose groups span slices
    across_slices: dict[str, int]
    memory: int  # bytes read from and written to main memory


def shape_bytes(shape: str, *, main_memory: bool = False) -> int:
    """Bytes of an array or tuple shape, tile padding not counted.

    With ``main_memory`` only of what lives in main memory (space 0), not on the chip.

    >>> shape_bytes("(f32[4,2]{1,0}, bf16[8]{0:T(256)S(1)})")
    48
    >>> shape_bytes("(f32[4,2]{1,0}, bf16[8]{0:T(256)S(1)})", main_memory=True)
    32
    """
    total = 0
    for kind, sizes, layout in _ARRAY.findall(shape):
        if main_memory and re.search(r"S\([1-9]\d*\)", layout):
            continue
        digits = re.search(r"\d+", kind)
        bits = 8 if kind == "pred" else int(digits[0]) if digits else 0
        total += math.ceil(math.prod(_numbers(sizes)) * bits / 8)
    return total


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def parse(text: str) -> tuple[str, dict[str, list[Instruction]]]:
    """The entry computation's name, and the instructions of every computation."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head and " = " not in line.split("(")[0]:
            current = computations.setdefault(head.group(2), [])
            entry = head.group(2) if head.group(1) else entry
            continue
        found = _LINE.match(line)
        if found and current is not None:
            current.append(_instruction(*found.groups()))
    return entry, computations


def _instruction(root: str | None, name: str, text: str) -> Instruction:
    # A tuple's shape has parentheses of its own, and so have layouts.
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shape, text = text[:end], text[end:].lstrip()
    start = text.index("(")
    end = _closing(text, start)
    arguments = text[start + 1 : end]
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    opcode, rest = text[:start], text[end + 1 :]
    return Instruction(name, opcode, shape, operands, arguments, rest, bool(root))


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise ValueError(f"Unbalanced parentheses in HLO: {text[:80]!r}.")


def _called(instruction: Instruction, *attributes: str) -> list[str]:
    """Names of the computations an instruction runs."""
    pattern = rf"(?:{'|'.join(attributes)})=(\{{[^}}]*\}}|%[\w.\-]+)"
    groups = re.findall(pattern, instruction.rest)
    return re.findall(r"%([\w.\-]+)", " ".join(groups))


def trip_count(
    loop: Instruction, computations: Mapping[str, list[Instruction]]
) -> int | None:
    """How often a loop runs at most, from ``counter < constant``; None: unknown."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
        return int(known[1])
    todo = _called(loop, "condition")
    instructions: list[Instruction] = []
    while todo:
        found = computations[todo.pop()]
        instructions += found
        todo += [name for i in found for name in _called(i, "calls")]
    compared = any(
        i.opcode == "compare" and "direction=LT" in i.rest for i in instructions
    )
    bounds = {
        int(i.arguments)
        for i in instructions
        if i.opcode == "constant" and re.match(r"[su]32\[\]", i.shape)
    }
    return bounds.pop() if compared and len(bounds) == 1 else None


def walk(
    entry: str, computations: Mapping[str, list[Instruction]]
) -> Iterator[tuple[str, list[Instruction], int, bool]]:
    """Yields ``(host, instructions, runs, fused)`` of every computation that runs.

    ``host`` is the computation itself, or the one whose fusion it belongs to. A loop
    whose count is unknown counts once; a conditional counts all its branches.
    """
    todo = [(entry, entry, 1, False)]
    while todo:
        name, host, runs, fused = todo.pop()
        instructions = computations[name]
        yield host, instructions, runs, fused
        for i in instructions:
            if i.opcode == "while":
                trips = trip_count(i, computations) or 1
                called = _called(i, "body", "condition")
                todo += [(inner, inner, runs * trips, fused) for inner in called]
            elif i.opcode == "fusion" or i.opcode.startswith("async-"):
                todo += [(inner, host, runs, True) for inner in _called(i, "calls")]
            elif i.opcode in ("call", "conditional"):
                branches = ("to_apply", "branch_computations")
                branches += ("true_computation", "false_computation")
                todo += [(inner, inner, runs, fused) for inner in _called(i, *branches)]


def traffic(text: str, slice_of: Mapping[int, int] | None = None) -> Traffic:
    """Bytes that one run of a compiled program moves, per device.

    A collective over ``n`` devices sends, in a ring: ``(n - 1) / n`` of the gathered
    or scattered array, twice that for an all-reduce, all of it for a permute.

    Args:
      text: ``compiled.as_text()``, partitioned and scheduled.
      slice_of: slice of each device, by its position in the program's device list;
        None: all in one.
    """
    entry, computations = parse(text)
    inside: dict[str, int] = defaultdict(int)
    across: dict[str, int] = defaultdict(int)
    memory = 0
    seen: set[tuple[str, str, str]] = set()
    for host, instructions, runs, fused in walk(entry, computations):
        shapes = {i.name: i.shape for i in instructions}
        for i in instructions:
            kind = i.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                channel = re.search(r"channel_id=(\d+)", i.rest)
                if channel:  # an asynchronous one is written once per piece
                    key = (host, kind, channel[1])
                    if key in seen:
                        continue
                    seen.add(key)
                groups = device_groups(i.rest)
                slices = [{slice_of[d] for d in g} if slice_of else {0} for g in groups]
                spans = any(len(found) > 1 for found in slices)
                size = runs * _sent(kind, i, shapes, groups)
                (across if spans else inside)[kind] += size
        if not fused:
            memory += runs * sum(
                _accesses(i, shapes, computations) for i in instructions
            )
    return Traffic(dict(inside), dict(across), memory)


def _sent(
    kind: str, i: Instruction, shapes: Mapping[str, str], groups: list[list[int]]
) -> int:
    operands = sum(shape_bytes(shapes.get(name, "")) for name in i.operands)
    n = max((len(group) for group in groups), default=1)
    if kind == "collective-permute":
        return operands
    if kind == "all-gather":
        return operands * (n - 1)
    share = 2 if kind == "all-reduce" else 1
    return share * operands * (n - 1) // n


def device_groups(attributes: str) -> list[list[int]]:
    """The groups of devices a collective runs in, from its attributes.

    >>> device_groups("replica_groups={{0,2},{1,3}}, dimensions={0}")
    [[0, 2], [1, 3]]
    >>> device_groups("replica_groups=[2,2]<=[2,2]T(1,0), dimensions={2}")
    [[0, 2], [1, 3]]
    >>> device_groups("replica_groups=mesh['a'=2,'b'=2] {'b'}, to_apply=%add")
    [[0, 1], [2, 3]]
    """
    found = re.search(r"replica_groups=mesh\[(.*?)\](.*?\{(.*?)\})", attributes)
    if found:
        axes = re.findall(r"'(\w+)'", found[1])
        sizes = list(map(int, re.findall(r"=(\d+)", found[1])))
        own = [a in re.findall(r"'(\w+)'", found[3]) for a in axes]
        devices = np.arange(math.prod(sizes)).reshape(sizes)
        devices = devices.transpose(np.argsort(own, kind="stable"))
        width = math.prod(n for n, inside in zip(sizes, own, strict=True) if inside)
        return devices.reshape(-1, width).tolist()
    found = re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    )
    if found:
        sizes = _numbers(found[2])
        devices = np.arange(math.prod(sizes)).reshape(sizes)
        if found[3]:
            devices = devices.transpose(_numbers(found[3]))
        return devices.reshape(_numbers(found[1])).tolist()
    found = re.search(
        r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", attributes
    )
    return [_numbers(g) for g in re.findall(r"\{(.*?)\}", found[1])] if found else []


def _accesses(
    i: Instruction,
    shapes: Mapping[str, str],
    computations: Mapping[str, list[Instruction]],
) -> int:
    """Bytes an instruction reads from and writes to main memory.

    A slice of a larger array counts as the slice, also inside a fusion: a scanned
    layer reads its own parameters, not those of all layers.
    """
    if i.opcode in _FREE or i.opcode.endswith("-done"):
        return 0
    read = [shape_bytes(shapes.get(o, ""), main_memory=True) for o in i.operands]
    written = shape_bytes(i.shape, main_memory=True)
    if i.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * written
    if i.opcode == "dynamic-update-slice":
        return 2 * read[1]
    if i.opcode == "copy-start":
        return shape_bytes(_ARRAY.search(i.shape)[0], main_memory=True) + sum(read)
    if i.opcode == "fusion":
        body = computations[_called(i, "calls")[0]]
        return _fusion_accesses(i, body, read)
    return written + sum(read)


def _fusion_accesses(i: Instruction, body: list[Instruction], read: list[int]) -> int:
    by_name = {inner.name: inner for inner in body}
    (root,) = [inner for inner in body if inner.root]
    results = [root]
    if root.opcode == "tuple":
        results = [by_name[name] for name in root.operands]
    total = 0
    in_place: set[str] = set()
    for result in results:
        while result.opcode in ("bitcast", "convert", "copy") and result.operands:
            source = by_name[result.operands[0]]
            if source.opcode not in ("bitcast", "dynamic-update-slice"):
                break
            result = source
        if result.opcode == "parameter":  # passed through
            in_place.add(result.name)
        elif result.opcode == "dynamic-update-slice":
            update = by_name[result.operands[1]].shape
            on_chip = shape_bytes(result.shape, main_memory=True) == 0
            total += 0 if on_chip else shape_bytes(update)
            in_place.add(result.operands[0])
        else:
            total += shape_bytes(result.shape, main_memory=True)
    for parameter in (inner for inner in body if inner.opcode == "parameter"):
        users = [inner for inner in body if parameter.name in inner.operands]
        whole = read[int(parameter.arguments)]
        if not whole or (parameter.name in in_place and len(users) <= 1):
            continue
        if users and all(u.opcode in ("dynamic-slice", "slice") for u in users):
            whole = min(whole, sum(shape_bytes(u.shape) for u in users))
        total += whole
    return total

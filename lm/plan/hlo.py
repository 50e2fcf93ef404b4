"""What a compiled program moves, read from its text: collectives by kind and mesh axis, and traffic of its memory.

XLA's own cost analysis counts the body of a loop once; here everything is counted as often as it runs.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}  # the others have theirs in their name
_SHAPE = re.compile(r"([a-z][a-z0-9]*)\[([0-9,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"%([\w.\-]+)")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_NAMED_GROUPS = re.compile(
    r"replica_groups=@?\w*mesh\[([^\]]*)\](?:, device_ids=\(\[([0-9,]+)\](?:T\(([0-9,]+)\))?\))?\s*\{([^}]*)\}"
)
_CALLED = re.compile(r"(body|condition|calls|to_apply|branch_computations|true_computation|false_computation)=")

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# TPUs may gather over a whole slice by adding up arrays that are zero but for a device's own part.
GATHERED_BY_SUMS = "all-gather as all-reduce"
# What crosses the network between slices is handed to the host: a `send` that names what becomes of it.
BETWEEN_SLICES = " between slices"

# What moves nothing: views, and what stands for the work of other instructions.
_FREE = frozenset(
    (
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "while",
        "call",
        "conditional",
        "after-all",
        "partition-id",
        "replica-id",
        "iota",
        "copy-done",
        "all-gather-done",
        "all-reduce-done",
        "collective-permute-done",
        "async-done",
        "async-update",
        "opt-barrier",
        "domain",
        "add-dependency",
    )
)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    rest: str
    """What follows the operands."""
    root: bool


@dataclass
class Computation:
    """The instructions of a computation by name."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        """What it returns."""
        return next(one for one in self.instructions.values() if one.root)


@dataclass(frozen=True)
class Collective:
    """Collectives of a step that are alike."""

    kind: str
    """One of `COLLECTIVES`, or `GATHERED_BY_SUMS`; with `BETWEEN_SLICES` the part of one that crosses the network."""
    axes: tuple[str, ...]
    """Mesh axes that it goes over."""
    devices: int
    """Devices that take part in one."""
    payload: float
    """Bytes for each device of what is moved, whole: the gathered array, the array that is summed."""
    count: int
    """How often they run in a step."""

    @property
    def sent(self) -> float:
        """Bytes that a device sends, where each goes around a ring: the least there is."""
        share = (self.devices - 1) / self.devices
        kind = self.kind.removesuffix(BETWEEN_SLICES)
        if kind == "collective-permute":
            return self.payload
        return self.payload * share * (2 if kind in ("all-reduce", GATHERED_BY_SUMS) else 1)


class Program:
    """A compiled program's text (`jax.stages.Compiled.as_text`), taken apart."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        current: Computation | None = None
        for line in text.splitlines():
            if current is None or not line.startswith(" "):
                header = _HEADER.match(line)
                if header:
                    current = self.computations[header[2]] = Computation(header[2])
                    self.entry = header[2] if header[1] else self.entry
                continue
            made = _parse(line)
            if made is not None:
                current.instructions[made.name] = made

    @functools.cached_property
    def runs(self) -> Counter[str]:
        """How often each computation that is no part of a fusion runs in a step."""
        found: Counter[str] = Counter()

        def walk(name: str, times: int) -> None:
            found[name] += times
            for one in self.computations[name].instructions.values():
                if one.opcode == "while":
                    called = self._called(one)
                    rounds = self._rounds(one, called["condition"][0])
                    walk(called["body"][0], times * rounds)
                elif one.opcode in ("call", "conditional", "async-start"):
                    for inner in [name for names in self._called(one).values() for name in names]:
                        walk(inner, times)

        if self.entry:
            walk(self.entry, 1)
        return found

    def collectives(self, sizes: Mapping[str, int], slices: int = 1, across: str = "data") -> list[Collective]:
        """All collectives of a step, alike ones together; the largest first.

        Args:
          sizes: of the mesh's axes, in their order.
          slices: of TPUs, that the devices are of.
          across: the mesh axis between slices.
        """
        payloads: Counter[tuple[str, tuple[str, ...], int]] = Counter()
        counts: Counter[tuple[str, tuple[str, ...], int]] = Counter()
        for name, times in self.runs.items():
            # One collective may stand in several fusions that do it piece by piece; its channel tells. Of those that
            # stand alone it doesn't: all that `jax.shard_map` writes share one. A round of a loop that is done before
            # or after it has the channels of the loop.
            for _, (kind, size, devices, axes) in dict.fromkeys(self._collectives_of(self.computations[name], sizes)):
                payloads[kind, axes, devices] += size * times
                counts[kind, axes, devices] += times
            for kind, size in self._sent_between(self.computations[name]):
                payloads[kind, (across,), slices] += size * times
                counts[kind, (across,), slices] += times
        found = [Collective(*key, payload, counts[key]) for key, payload in payloads.items()]
        return sorted(found, key=lambda one: -one.payload)

    def traffic(self) -> int:
        """Bytes that a step reads from and writes to a device's main memory, intermediate results in caches aside.

        Each instruction that runs reads its operands and writes its result; a slice of an array counts alone, and so
        does what is written into one in place.
        """
        total = 0
        for name, times in self.runs.items():
            computation = self.computations[name]
            total += times * sum(self._moved(one, computation) for one in computation.instructions.values())
        return total

    def _called(self, one: Instruction) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for match in _CALLED.finditer(one.rest):
            rest = one.rest[match.end() :]
            listed = rest[: rest.index("}")] if rest.startswith("{") else re.split(r"[,\s]", rest, maxsplit=1)[0]
            found[match[1]] = [name.strip().lstrip("%") for name in listed.strip("{").split(",")]
        return found

    def _rounds(self, loop: Instruction, condition: str) -> int:
        """Rounds of a loop: as the compiler notes them, or the constant that its counter is compared with."""
        known = re.search(r'known_trip_count"?\s*[:=]\s*\{"?n"?\s*[:=]\s*"?(\d+)', loop.rest)
        if known:
            return int(known[1])
        called = self._called(loop)
        asked, body = self.computations[condition], self.computations[called["body"][0]]
        limit = max(filter(None, map(_constant, asked.instructions.values())), default=1)
        # The counter may go up by more than 1, where a loop was unrolled.
        counters = {found[1] for one in asked.instructions.values() if (found := re.match(r", index=(\d+)", one.rest))}
        step = 1
        if len(counters) == 1 and body.root.opcode == "tuple":
            made = body.instructions[body.root.operands[int(counters.pop())]]
            while made.opcode in ("copy", "bitcast"):
                made = body.instructions[made.operands[0]]
            if made.opcode == "add":
                step = max(filter(None, (_constant(body.instructions[name]) for name in made.operands)), default=1)
        return -(-limit // step)

    def _collectives_of(
        self, computation: Computation, sizes: Mapping[str, int]
    ) -> Iterator[tuple[str, tuple[str, int, int, tuple[str, ...]]]]:
        """Of each what it is told by (its channel in a fusion, else its name), and kind, payload, devices and axes."""
        for one in computation.instructions.values():
            if one.opcode == "fusion":
                inner = self.computations[self._called(one)["calls"][0]]
                for own, (kind, size, devices, axes) in self._collectives_of(inner, sizes):
                    numbered = re.search(r"channel_id=(\d+)", inner.instructions[own].rest)
                    # A sum of which each device keeps its part.
                    scattered = kind == "all-reduce" and _bytes(one.shape) * devices <= size * 1.001
                    shown = numbered[1] if numbered else f"{one.name} {own}"
                    yield shown, ("reduce-scatter" if scattered else kind, size, devices, axes)
                continue
            kind = one.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            devices, axes = _participants(one.rest, sizes)
            if not axes:  # each device with itself
                continue
            parts: Counter[str] = Counter()
            for operand in one.operands:
                made = computation.instructions.get(operand)
                size = _bytes(made.shape) if made else 0
                gathers = kind == "all-reduce" and made is not None and self._is_part_of_zeros(made, computation)
                parts[GATHERED_BY_SUMS if gathers else kind] += size * (devices if kind == "all-gather" else 1)
            for name, size in parts.items():
                yield one.name, (name, size, devices, axes)

    def _sent_between(self, computation: Computation) -> Iterator[tuple[str, int]]:
        """Kind and payload of what goes to other slices."""
        for one in computation.instructions.values():
            kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', one.rest)
            if one.opcode == "send" and kind:
                size = _bytes(computation.instructions[one.operands[0]].shape)
                yield kind[1].lower().replace("_", "-") + BETWEEN_SLICES, size

    def _is_part_of_zeros(self, one: Instruction, computation: Computation) -> bool:
        """Whether an array is a device's part among zeros."""
        while one.opcode in ("bitcast", "copy", "get-tuple-element") and one.operands[0] in computation.instructions:
            one = computation.instructions[one.operands[0]]
        if one.opcode == "dynamic-update-slice":
            return True
        if one.opcode != "fusion":
            return False
        inner = self.computations[self._called(one)["calls"][0]]
        size = _bytes(one.shape)
        return any(
            found.opcode == "dynamic-update-slice" and _bytes(found.shape) >= size
            for found in inner.instructions.values()
        )

    def _moved(self, one: Instruction, computation: Computation) -> int:
        if one.opcode in _FREE:
            return 0
        made = computation.instructions
        shapes = [made[name].shape if name in made else "" for name in one.operands]
        if one.opcode == "dynamic-slice":
            return 2 * _main(one.shape)
        if one.opcode == "dynamic-update-slice":
            return 2 * _main(shapes[1])
        if one.opcode == "gather":
            return 2 * _main(one.shape)
        if one.opcode == "copy-start":  # to or from a faster memory, or from one place to another
            return _main(shapes[0]) + _main(_elements(one.shape)[0])
        if one.opcode != "fusion":
            kinds = tuple(f"{kind}-start" for kind in COLLECTIVES)
            written = 0 if one.opcode in kinds else _main(one.shape)
            return sum(map(_main, shapes)) + (sum(map(_main, shapes)) if one.opcode in kinds else written)
        inner = self.computations[self._called(one)["calls"][0]]
        read = sum(min(_main(shape), self._read_of(inner, index)) for index, shape in enumerate(shapes) if _main(shape))
        root = inner.root
        results = [inner.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
        outer = _elements(one.shape)
        written = 0
        for result, shape in zip(results, outer):
            while result.opcode == "bitcast":
                result = inner.instructions[result.operands[0]]
            if _main(shape) and result.opcode == "dynamic-update-slice":
                written += _bytes(inner.instructions[result.operands[1]].shape)
            else:
                written += _main(shape)
        return read + written

    def _read_of(self, fused: Computation, index: int) -> int:
        """Bytes that a fusion reads of an operand: of one that it only slices, the slices."""
        name = next(
            one.name
            for one in fused.instructions.values()
            if one.opcode == "parameter" and one.rest.startswith(f"{index})")
        )
        whole = _bytes(fused.instructions[name].shape)
        names, read = [name], 0
        while names:
            source = names.pop()
            for one in fused.instructions.values():
                if source not in one.operands:
                    continue
                if one.opcode == "bitcast":
                    names.append(one.name)
                elif one.opcode in ("dynamic-slice", "gather", "slice") and one.operands[0] == source:
                    read += _bytes(one.shape)
                elif one.opcode == "dynamic-update-slice" and one.operands[0] == source:
                    continue
                elif one.opcode == "fusion":
                    nested = self.computations[self._called(one)["calls"][0]]
                    read += sum(self._read_of(nested, at) for at, name in enumerate(one.operands) if name == source)
                else:
                    return whole
        return read


def _parse(line: str) -> Instruction | None:
    start = _INSTRUCTION.match(line)
    if not start:
        return None
    rest = line[start.end() :]
    if rest.startswith("("):
        end = _closing(rest, 0) + 1
    else:
        end = rest.find(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opened = rest.find("(")
    if opened < 0:
        return None
    opcode = rest[:opened]
    closed = _closing(rest, opened)
    inside, after = rest[opened + 1 : closed], rest[closed + 1 :]
    if opcode in ("parameter", "constant"):  # a number, not names
        return Instruction(start[2], opcode, shape, (), f"{inside}){after}", bool(start[1]))
    operands = tuple(_NAME.findall(inside))
    return Instruction(start[2], opcode, shape, operands, after, bool(start[1]))


def _constant(one: Instruction) -> int | None:
    """The value of a whole number that the program holds."""
    found = re.match(r"(\d+)\)", one.rest) if one.opcode == "constant" else None
    return int(found[1]) if found else None


def _closing(text: str, opened: int) -> int:
    depth = 0
    for match in re.finditer(r"[()]", text[opened:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return opened + match.start()
    return len(text) - 1


def _elements(shape: str) -> list[str]:
    """The arrays of a shape, each with its layout."""
    return [match[0] for match in _SHAPE.finditer(shape)]


@functools.cache
def _bytes(shape: str) -> int:
    """Bytes of an array or a tuple of them."""
    total = 0
    for kind, dims, _ in _SHAPE.findall(shape):
        bits = _BITS.get(kind)
        if bits is None:
            found = re.search(r"\d+", kind)
            bits = int(found[0]) if found else 8
        total += math.prod(int(dim) for dim in dims.split(",") if dim) * bits // 8
    return total


@functools.cache
def _main(shape: str) -> int:
    """Bytes in main memory: layouts say of the others in which memory they are, `S(1)` and so on."""
    return sum(_bytes(one) for one in _elements(shape) if "S(" not in one)


def _participants(rest: str, sizes: Mapping[str, int]) -> tuple[int, tuple[str, ...]]:
    """How many devices take part in a collective, and over which mesh axes they lie."""
    devices = math.prod(sizes.values())
    pairs = re.search(r"source_target_pairs=\{(.*?\})\}", rest)
    if pairs:
        groups = [[int(number) for number in pair.split(",")] for pair in re.findall(r"\{([0-9,]+)\}", pairs[1])]
    else:
        groups = _groups(rest, devices)
    axes: set[str] = set()
    for group in groups:
        places = np.array(np.unravel_index(np.array(group), tuple(sizes.values())))
        axes |= {axis for axis, at in zip(sizes, places) if len(set(at.tolist())) > 1}
    return max((len(group) for group in groups), default=1), tuple(axis for axis in sizes if axis in axes)


def _groups(rest: str, devices: int) -> list[list[int]]:
    """The groups of `replica_groups`, in any of XLA's ways to write them."""
    listed = re.search(r"replica_groups=\{((?:\{[0-9,]*\},?)+)\}", rest)
    if listed:
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([0-9,]+)\}", listed[1])]
    iota = re.search(r"replica_groups=\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?", rest)
    if iota:
        return _iota(iota[2], iota[3]).reshape(_numbers(iota[1])).tolist()
    named = _NAMED_GROUPS.search(rest)
    if named:
        dims = [(part.split("=")[0].strip("' "), int(part.split("=")[1])) for part in named[1].split(",")]
        ids = _iota(named[2], named[3]) if named[2] else np.arange(math.prod(size for _, size in dims))
        return _along(ids, dict(dims), [part.strip() for part in named[4].split(",") if part.strip()])
    return [list(range(devices))]


def _along(ids: np.ndarray, dims: dict[str, int], wanted: list[str]) -> list[list[int]]:
    """Groups of devices along axes of a mesh; of an axis perhaps only a part, `'x':(2)4` = the 4 that follow 2."""
    shape: list[int] = []
    inside: list[int] = []
    chosen = {}
    for text in wanted:
        name, _, part = text.partition(":")
        chosen[name.strip("'")] = part
    for name, size in dims.items():
        if name not in chosen:
            shape.append(size)
            continue
        inner = re.match(r"\((\d+)\)(\d+)", chosen[name])
        before, along = (int(inner[1]), int(inner[2])) if inner else (1, size)
        shape += [before, along, size // (before * along)]
        inside.append(len(shape) - 2)
    grid = ids.reshape(shape)
    others = [axis for axis in range(grid.ndim) if axis not in inside]
    count = math.prod(grid.shape[axis] for axis in inside)
    return grid.transpose(*others, *inside).reshape(-1, count).tolist()


def _iota(dims: str, order: str | None) -> np.ndarray:
    shape = _numbers(dims)
    ids = np.arange(math.prod(shape)).reshape(shape)
    return (ids.transpose(_numbers(order)) if order else ids).ravel()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))

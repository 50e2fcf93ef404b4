"""Names and shapes of weights, there and here: a row a weight, read in both directions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lm.errors import UserError
from lm.models.config import ModelConfig
from lm.tree import STACKS

Shape = tuple[int, ...]
Names = Iterable[str]


@dataclass(frozen=True)
class Row:
    """One of our parameters and the weight it is, or is a part of."""

    theirs: str
    """The weight's name; `{}` stands for the layer."""
    ours: str
    """The parameter's path; below `layers` and `encoder_layers` it has a leading layer axis."""
    form: Literal["same", "flat", "in_out", "out_in"] = "same"
    """How theirs is laid out: as ours; as a vector; as a matrix of inputs by outputs; as its transpose."""
    inputs: int = 1
    """Of a matrix: how many of our leading axes are inputs."""
    part: tuple[int, int] = (0, 1)
    """Of a weight that holds several of our parameters side by side along its outputs: which of how many."""
    beside: str = ""
    """A parameter without which this row does not hold."""
    without: str = ""
    """A parameter with which this row does not hold."""

    @property
    def stacked(self) -> bool:
        """Whether there is one weight a layer."""
        return self.ours.split("/")[0] in STACKS

    def names(self, shape: Shape) -> list[str]:
        """The weights of a parameter of this shape, in order of layers."""
        return [self.theirs.format(i) for i in range(shape[0])] if self.stacked else [self.theirs]

    def layer(self, shape: Shape) -> Shape:
        """The shape of one layer of a parameter."""
        return shape[1:] if self.stacked else shape

    def their_shape(self, shape: Shape) -> Shape:
        """The weight's shape, from that of one layer of our parameter."""
        if self.form == "same":
            return shape
        if self.form == "flat":
            return (math.prod(shape) * self.part[1],)
        rows, columns = math.prod(shape[: self.inputs]), math.prod(shape[self.inputs :]) * self.part[1]
        return (rows, columns) if self.form == "in_out" else (columns, rows)

    def to_ours(self, weight: np.ndarray, shape: Shape) -> np.ndarray:
        """One layer of our parameter, of this shape, from the weight: a view where that can be."""
        index, count = self.part
        if count > 1:
            axis = 0 if self.form == "out_in" else weight.ndim - 1
            size = weight.shape[axis] // count
            weight = np.take(weight, range(index * size, (index + 1) * size), axis=axis)
        return (weight.T if self.form == "out_in" else weight).reshape(shape)

    def to_theirs(self, layer: np.ndarray) -> np.ndarray:
        """The weight, or its part, from one layer of our parameter."""
        if self.form in ("same", "flat"):
            return layer if self.form == "same" else layer.reshape(-1)
        matrix = layer.reshape(math.prod(layer.shape[: self.inputs]), -1)
        return matrix if self.form == "in_out" else matrix.T

    @property
    def axis(self) -> int:
        """Along which axis parts lie side by side."""
        return 0 if self.form in ("flat", "out_in") else 1


@dataclass(frozen=True)
class Family:
    """Models that share their names of weights."""

    name: str
    kinds: tuple[str, ...]
    """What `model_type` in a config.json says."""
    architectures: tuple[str, ...]
    """What `architectures` there may say."""
    prefix: str
    """What names begin with, and those of a model without heads lack."""
    rows: Callable[[str], Sequence[Row]]
    """The table, for an architecture."""
    table: str
    """The weight of the token embedding."""
    head: str
    """The weight of the output head, which a tied model's files may hold again."""
    known: tuple[str, ...]
    """Regular expressions of further names that files hold and that say nothing: masks, positions, copies."""
    read: Callable[[Mapping[str, Any], Names], ModelConfig]
    """A model from a config.json and the names of the weights beside it (`canonical` ones)."""
    write: Callable[[ModelConfig, str], dict[str, Any]]
    """A config.json from a model, with `model_type`; the second argument is one of `kinds`."""
    architecture: Callable[[Mapping[str, Any], Names], str]
    """Which of `architectures` a config.json and the names beside it are, as the table tells them apart."""
    choose: Callable[[str, ModelConfig, str], str]
    """Which of `architectures` a model is, as one of `kinds`, that was trained for a task of this kind."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Regular expressions of names in older files, and what they are now."""
    copies: tuple[str, ...] = ()
    """Names under which files may hold the token embedding instead."""
    tied: bool = False
    """Whether the head is the token embedding where a config.json doesn't say."""

    def canonical(self, names: Names) -> dict[str, str]:
        """From the names of the table to those in the files."""
        found: dict[str, str] = {}
        rows = [row for architecture in self.architectures for row in self.rows(architecture)]
        heads = {row.theirs.split(".")[0] for row in rows} | {self.head.split(".")[0]}
        bare = self.prefix and not any(name.startswith(self.prefix) for name in names)
        for name in names:
            plain = name
            for pattern, now in self.renamed:
                plain = re.sub(pattern, now, plain)
            if bare and plain.split(".")[0] not in heads:
                plain = self.prefix + plain
            found[plain] = name
        for copy in (*self.copies, self.head):
            if self.table not in found and copy in found:
                found[self.table] = found.pop(copy)
        return found

    def ignores(self, name: str) -> bool:
        """Whether a name that no row has is one of those that say nothing."""
        return any(re.fullmatch(pattern, name) for pattern in self.known)

    def rows_of(self, architecture: str, paths: Iterable[str]) -> list[Row]:
        """The rows of a model's parameters, which are all in the table."""
        there = set(paths)
        rows = [
            row
            for row in self.rows(architecture)
            if row.ours in there and row.without not in there and (not row.beside or row.beside in there)
        ]
        lacking = sorted(there - {row.ours for row in rows})
        if lacking:
            raise UserError(f"{self.name} has no place for {listed(lacking)}; choose another model")
        return rows


def dense(theirs: str, ours: str, *, inputs: int = 1, form: Literal["in_out", "out_in"] = "out_in") -> tuple[Row, Row]:
    """The rows of a projection: its matrix and its bias."""
    return (
        Row(f"{theirs}.weight", f"{ours}/kernel", form, inputs),
        Row(f"{theirs}.bias", f"{ours}/bias", "flat"),
    )


def norm(theirs: str, ours: str) -> tuple[Row, Row]:
    """The rows of a norm."""
    return Row(f"{theirs}.weight", f"{ours}/scale"), Row(f"{theirs}.bias", f"{ours}/bias")


def listed(names: Iterable[str]) -> str:
    """Names in a line, those that differ in their first number alone as one: `h.{0-2,5}.mlp.c_fc.weight`."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name in names:
        found = re.match(r"(.*?[./])(\d+)([./].*)", name)
        key = (found.group(1), found.group(3)) if found else (name, "")
        numbers = groups.setdefault(key, [])
        if found:
            numbers.append(int(found.group(2)))
    return ", ".join(
        before + (f"{{{_ranges(numbers)}}}" if len(numbers) > 1 else "".join(map(str, numbers))) + after
        for (before, after), numbers in groups.items()
    )


def _ranges(numbers: list[int]) -> str:
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)

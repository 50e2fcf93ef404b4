"""Parameter trees by path: names such as `layers/attention/query/kernel`, and values given to them by patterns.

Freezing, weight decay and per-group rules all choose parameters in this one way: an ordered list of
`(pattern, value)` in which the first match wins and every parameter must match something, so that a parameter
added later is never treated by accident.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax

from lm.errors import UserError, check

Value = TypeVar("Value")

# Parameters of all layers of a stack are one array with a leading layer axis, below one of these names.
STACKS = ("layers", "encoder_layers")

# How many parameters an error message spells out.
_NAMED_IN_ERROR = 8


def path_string(path: jax.tree_util.KeyPath) -> str:
    """A JAX key path as `/`-joined names: dict keys, attribute names and sequence indices alike."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def path_leaves(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of `tree` with their paths, in JAX's flattening order."""
    return [(path_string(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def match_patterns(tree: Any, rules: Sequence[tuple[str, Value]]) -> Any:
    """Gives every leaf of `tree` the value of the first rule whose pattern matches its whole path.

    Args:
        tree: any tree; only its paths are read.
        rules: `(regular expression, value)` pairs, tried in order with `re.fullmatch`.

    Returns:
        A tree shaped like `tree` that holds the values. A value of `None` stands where a leaf stood, as
        `MuonDimensionNumbers` and masks in optax expect it.

    Raises:
        UserError: a leaf matches no pattern, or a pattern is not a regular expression.
    """
    return _matched(tree, rules, lambda path, leaf: [path])


def match_layers(tree: Any, rules: Sequence[tuple[str, Value]]) -> Any:
    """`match_patterns` that tells layers apart: `layers/3/mlp/up/kernel` is matched as well as `layers/mlp/up/kernel`.

    Args:
        tree: any tree with shapes, its leaves of stacks with a leading layer axis.
        rules: as for `match_patterns`; the first whose pattern matches either path of a layer gives its value.

    Returns:
        A tree shaped like `tree`: of a leaf of a stack a list of the values of its layers, else a value.

    Raises:
        UserError: as `match_patterns`.
    """

    def names(path: str, leaf: Any) -> list[str]:
        stack, _, rest = path.partition("/")
        return [f"{stack}/{layer}/{rest}" for layer in range(leaf.shape[0])] if stack in STACKS else [path]

    return _matched(tree, rules, names)


def _matched(tree: Any, rules: Sequence[tuple[str, Value]], names: Callable[[str, Any], list[str]]) -> Any:
    """Values by path, or, where `names` gives other names for a path, lists of them."""
    compiled = [(_compile(pattern), value) for pattern, value in rules]
    values: list[Any] = []
    uncovered = []
    for path, leaf in path_leaves(tree):
        asked, found = names(path, leaf), []
        for name in asked:
            for pattern, value in compiled:
                if pattern.fullmatch(path) or pattern.fullmatch(name):
                    found.append(value)
                    break
            else:
                uncovered.append(name)
        values.append(found[0] if asked == [path] and found else found)
    shown = ", ".join(uncovered[:_NAMED_IN_ERROR]) + (", …" if len(uncovered) > _NAMED_IN_ERROR else "")
    check(
        not uncovered,
        f"{len(uncovered)} parameter(s) match no pattern: {shown}; the patterns are"
        f" {', '.join(repr(pattern) for pattern, _ in rules)}; add one that covers them ('.*' covers the rest)",
    )
    return jax.tree.unflatten(jax.tree.structure(tree), values)


def split(tree: Any, mask: Any) -> tuple[Any, Any]:
    """Two trees of the same shape: the leaves where `mask` is true, and the others; None stands in place of a leaf."""
    return (
        jax.tree.map(lambda leaf, here: leaf if here else None, tree, mask),
        jax.tree.map(lambda leaf, here: None if here else leaf, tree, mask),
    )


def merge(first: Any, second: Any) -> Any:
    """The tree that was `split`."""
    return jax.tree.map(lambda a, b: b if a is None else a, first, second, is_leaf=lambda leaf: leaf is None)


def count_parameters(tree: Any) -> int:
    """The number of scalars in `tree`, whose leaves are arrays or `jax.ShapeDtypeStruct`s."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"{pattern!r} is not a regular expression ({error}); write one that matches whole parameter paths"
        ) from error

"""Reading a config.json: what is not there has its default, what can't be served is refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lm.errors import UserError, check

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
}
"""Names of activations there and here."""
MULTI_LABEL = "multi_label_classification"
"""What config.json calls classes of which a text may have several."""
GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh"}
"""Activations of gates, alone and with what they gate."""


def integer(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A whole number of at least 1. Raises `UserError` where there is none and no default."""
    value = config.get(name)
    value = default if value is None else value
    check(
        type(value) is int and value >= 1, f"config.json has {name} {value!r}; it must be a whole number of at least 1"
    )
    assert value is not None
    return value


def optional(config: Mapping[str, Any], name: str) -> int | None:
    """A whole number, or None."""
    return None if config.get(name) is None else integer(config, name)


def number(config: Mapping[str, Any], name: str, default: float) -> float:
    """A number of at least 0."""
    value = config.get(name)
    value = default if value is None else value
    check(
        type(value) in (int, float) and value >= 0, f"config.json has {name} {value!r}; it must be a number from 0 on"
    )
    return float(value)


def truth(config: Mapping[str, Any], name: str, default: bool) -> bool:
    """True or false."""
    value = config.get(name)
    value = default if value is None else value
    check(type(value) is bool, f"config.json has {name} {value!r}; it must be true or false")
    return bool(value)


def classes(config: Mapping[str, Any]) -> int:
    """How many classes a classifier tells apart. Raises `UserError` for what is no classifier but a regression."""
    names = config.get("id2label")
    found = len(names) if isinstance(names, dict) and names else integer(config, "num_labels", 2)
    kind = config.get("problem_type")
    check(
        kind in (None, "single_label_classification", MULTI_LABEL),
        f"config.json has problem_type {kind!r}; what is known is single_label_classification and {MULTI_LABEL}",
    )
    check(found >= 2, "config.json has one class, which transformers takes for a regression; a classifier has two")
    return found


def class_names(config: Mapping[str, Any], count: int) -> tuple[str, ...]:
    """What so many classes are called, in order of id; none if config.json has no names of its own for them."""
    given = config.get("id2label")
    found = [given.get(str(i)) for i in range(count)] if isinstance(given, dict) else []
    names = tuple(name for name in found if isinstance(name, str) and name.strip())
    return names if len(set(names)) == count and names != tuple(f"LABEL_{i}" for i in range(count)) else ()


def told_classes(names: Sequence[str]) -> dict[str, Any]:
    """The same as config.json has it."""
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def activation(config: Mapping[str, Any], name: str, default: str, gated: bool = False) -> Any:
    """An activation by our name, of a gate if `gated`."""
    value = config.get(name) or default
    ours = ACTIVATIONS.get(value) if isinstance(value, str) else None
    choices = [theirs for theirs, our in ACTIVATIONS.items() if not gated or our in GATED]
    check(
        ours is not None and (not gated or ours in GATED),
        f"config.json has {name} {value!r}; what is known is {', '.join(choices)}",
    )
    assert ours is not None
    return GATED[ours] if gated else ours


def their_activation(ours: str, gated: bool = False) -> str:
    """The name there; of gates if `gated`. Ours alone where there is none, which no family then reads."""
    names = {our: theirs for theirs, our in reversed(ACTIVATIONS.items())}
    plain = {both: alone for alone, both in GATED.items()}.get(ours) if gated else ours
    return names.get(plain or "", ours)


def only(config: Mapping[str, Any], name: str, allowed: Any, default: Any = None) -> None:
    """Raises `UserError` unless a setting has the one value that is served."""
    value = config.get(name, default)
    check(value == allowed, f"config.json has {name} {value!r}; this program has only {allowed!r}")


def refuse(name: str, value: Any, known: str) -> UserError:
    """The mistake of a value that is not served."""
    return UserError(f"config.json has {name} {value!r}; what is known is {known}")

"""Facts about a config field, kept with the field: which values it can have and what they affect."""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

AFFECTS = ("resume", "prediction", "execution")
BOUNDS = {
    "ge": (operator.ge, "at least"),
    "gt": (operator.gt, "above"),
    "le": (operator.le, "at most"),
    "lt": (operator.lt, "below"),
}


def field(
    default: Any,
    *,
    ge: int | float | None = None,
    gt: int | float | None = None,
    le: int | float | None = None,
    lt: int | float | None = None,
    choices: Sequence[str] = (),
    affects: Sequence[str] = ("resume", "prediction"),
) -> Any:
    """Declare a dataclass field with its facts; `check_fields` enforces bounds and choices.

    Args:
        ge, gt, le, lt: bounds of the number, or of each number of a tuple.
        choices: the strings it can be, or that a tuple can hold.
        affects: "resume": a training run cannot go on with another value; "prediction": the value is part of the
            identity of predictions; "execution": how the same model is stored or computed, not its architecture.
    """
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    facts = {name: bound for name, bound in bounds.items() if bound is not None}
    return dataclasses.field(default=default, metadata=facts | {"choices": tuple(choices), "affects": tuple(affects)})


def check_fields(config: Any) -> None:
    """Check every field of a dataclass against its bounds and choices.

    Raises:
        ValueError: a value is out of range; the message starts with `FIELD=VALUE`.
    """
    for one in dataclasses.fields(config):
        value = getattr(config, one.name)
        items = value if isinstance(value, tuple) else (value,)
        choices = one.metadata.get("choices")
        if choices and (unknown := [item for item in items if item not in choices]):
            chosen = f"no {unknown[0]!r}; choose among" if isinstance(value, tuple) else "choose one of"
            raise ValueError(f"{one.name}={value!r}: {chosen} {', '.join(choices)}")
        bounds = [(compare, one.metadata[name]) for name, (compare, _) in BOUNDS.items() if name in one.metadata]
        if not all(compare(item, bound) for item in items for compare, bound in bounds):
            raise ValueError(f"{one.name}={value!r}: must be {describe_range(one)}")


def describe_range(one: dataclasses.Field) -> str:
    """Describe the bounds of a field in words, as in "at least 0 and below 1"; empty without bounds."""
    return " and ".join(f"{word} {one.metadata[name]}" for name, (_, word) in BOUNDS.items() if name in one.metadata)


def fields_affecting(group: type, what: str) -> tuple[str, ...]:
    """List the dotted paths of the fields of a dataclass, and of those nested in it, that affect `what`.

    A field inside a group affects what both the group's field and it affect. A group declared without `field` affects
    everything; a plain field affects "resume" and "prediction".
    """
    names: list[str] = []
    for one in dataclasses.fields(group):
        nested = dataclasses.is_dataclass(one.type)
        if what in one.metadata.get("affects", AFFECTS if nested else AFFECTS[:2]):
            names += [f"{one.name}.{below}" for below in fields_affecting(one.type, what)] if nested else [one.name]
    return tuple(names)

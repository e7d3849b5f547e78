"""A model's settings as its own files state them, checked."""

import dataclasses
from collections.abc import Callable
from typing import Any, get_args, get_origin

from emollama_jax.errors import UserError
from emollama_jax.weights.tensors import WeightSource


def read_architecture(
    source: WeightSource, parse: Callable[[dict[str, Any]], dict[str, Any]], config: type, kind: str
) -> dict[str, Any]:
    """The fields of the dataclass `config` that a file's own configuration fixes.

    Args:
        parse: from the file's configuration to the fields; NotImplementedError for what the model does not have.
        kind: what the file must be, for messages: "LLaMA".

    Raises:
        UserError: no configuration, another architecture, a variant that the model does not have, or values that make
            no sense.
    """
    if source.config is None:
        raise UserError(f"no config.json beside the weights: {source.path}; copy it from where the weights came from")
    try:
        fields = parse(source.config)
        kinds = {field.name: field.type for field in dataclasses.fields(config)}
        if wrong := [f"{name}={value!r}" for name, value in fields.items() if not _is_of(kinds[name], value)]:
            raise ValueError(", ".join(wrong))
        config(**fields)
        return fields
    except KeyError as error:
        raise UserError(f"the configuration lacks {error}: {source.path}; it must be a {kind} model's") from error
    except NotImplementedError as error:
        raise UserError(f"{error}: {source.path}; only {kind} models without these are supported") from error
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"unusable configuration ({error}): {source.path}; download or copy it again") from error


def _is_of(kind: Any, value: Any) -> bool:
    """Whether a value has the type of a field: a plain one, or a tuple of any length."""
    if get_origin(kind) is tuple:
        return type(value) is tuple and all(type(item) is get_args(kind)[0] for item in value)
    return type(value) is kind


def check_variant(config: dict[str, Any], model_types: tuple[str, ...], unsupported: dict[str, bool]) -> None:
    """Raises NotImplementedError for another kind of model, or for a variant: `unsupported` says what is set."""
    if config.get("model_type") not in model_types:
        found = config.get("model_type", "nameless one")
        raise NotImplementedError(f"the model is a {found}, not a {' or '.join(model_types)}")
    if any(unsupported.values()):
        raise NotImplementedError(f"the model has {', '.join(name for name, is_set in unsupported.items() if is_set)}")

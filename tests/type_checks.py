"""beartype for jaxtyping's import hook, which decorates a nested function anew whenever the function around it runs."""

import inspect
from collections.abc import Callable
from typing import Any

from beartype import beartype

_checked: dict[tuple, Callable] = {}


def check_types(function: Callable) -> Callable:
    """The function with its annotations checked; for nested functions that are alike the checks are compiled once.

    Args:
        function: has the parameters and annotations of the one that jaxtyping decorates, and does nothing itself.
    """
    if "<locals>" not in function.__qualname__:
        return beartype(function)
    signature = inspect.signature(function)
    parameters = tuple((p.name, p.kind, p.default is p.empty, p.annotation) for p in signature.parameters.values())
    hints = [signature.return_annotation, *(hint for *_, hint in parameters)]
    if all(hint in (Any, signature.empty) for hint in hints):
        return function
    key = (function.__module__, function.__qualname__, str(hints), *(parameter[:3] for parameter in parameters))
    if key not in _checked:
        _checked[key] = beartype(function)
    return _checked[key]

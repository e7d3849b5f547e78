"""JSON files that other programs wrote."""

import json
from typing import Any

from emollama_jax.io.paths import PathLike, as_path


def read_json_object(path: PathLike) -> dict[str, Any]:
    """Reads a JSON object in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no JSON object.
    """
    try:
        value = json.loads(as_path(path).read_bytes())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value

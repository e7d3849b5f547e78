"""Language models into base checkpoints, one parameter at a time."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from emollama_jax.io.paths import PathLike, as_path
from emollama_jax.weights.base_checkpoint import write_base
from emollama_jax.weights.locate import is_hub_name
from emollama_jax.weights.model_identity import origin_of
from emollama_jax.weights.pretrained import load_base_tokenizer, read_carried, save_settings, stream_llama
from emollama_jax.weights.sources import open_source
from emollama_jax.weights.tensors import WeightSource


def write_base_from(
    source: WeightSource,
    folder: Path,
    *,
    dtype: str = "bfloat16",
    kernel_dtype: str = "",
    name: str,
    log: Callable[[str], None] = lambda line: None,
) -> str:
    """Writes a language model into an existing folder as a base checkpoint, and returns its fingerprint.

    Neither the host nor a device ever holds more of it than one stacked parameter.

    Args:
        dtype: storage of all but the blocks' kernels.
        kernel_dtype: storage of these: a float dtype, int8 or nf4; "" is as `dtype`.
        name: recorded as what it was made of; see `source_name`.
        log: is told what is read.

    Raises:
        UserError: no model there, damaged files, another architecture, or tensors that do not fit it.
    """
    config, params, report = stream_llama(source, param_dtype=dtype, kernel_dtype=kernel_dtype or dtype)
    # What is small comes first: nobody waits for the weights to learn that the tokenizer is missing.
    tokenizer, carried = load_base_tokenizer(source, config.vocab_size), read_carried(source)
    log(f"read    {len(report.read)} {source.format} tensors of {name}")
    log(f"dropped {', '.join(report.dropped) or 'nothing'}")
    save_settings(folder, config, tokenizer, carried, dtype=dtype)
    with ThreadPoolExecutor(1) as pool, open_source(source.path) as again:
        origin = pool.submit(origin_of, again)  # reads all tensors once more, meanwhile
        return write_base(folder, params, config, source=name, origin=origin.result)


def source_name(path: PathLike) -> str:
    """Returns the name by which other programs find a model: that on the hub, or the folder."""
    text = os.fspath(path)
    return text.removeprefix("hf://").partition("@")[0] if is_hub_name(path) else os.fspath(as_path(path))

"""GGUF files (llama.cpp), dequantised to float32 one tensor at a time.

The shapes are those of torch, [out, in]. The rows of q and k stay in llama.cpp's order.
"""

from functools import partial
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import dequantize

from emollama_jax.errors import UserError
from emollama_jax.weights.tensors import Contents, StoredTensor, damaged

_ROWS = 1024  # dequantised at once, so that the temporary arrays stay small


def open_gguf(path: Path) -> Contents:
    """The tensors of one GGUF file, and its metadata as plain Python values.

    Raises:
        UserError: the file is damaged, big-endian, or holds a type that the gguf package cannot dequantise.
    """
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        if "GGMLQuantizationType" in str(error):
            raise UserError(
                f"a quantisation that the gguf package does not know: {path}; use another one, e.g. Q8_0"
            ) from error
        raise damaged(path, "GGUF") from error
    if reader.endianess != gguf.GGUFEndian.LITTLE:
        raise UserError(f"a big-endian GGUF file: {path}; use the little-endian version")
    tensors = {}
    for tensor in reader.tensors:
        kind = tensor.tensor_type
        try:  # gguf is asked with one block of zeros
            dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError as error:
            raise UserError(
                f"cannot read quantisation {kind.name} of tensor {tensor.name}: {path}; use another one, e.g. Q8_0"
            ) from error
        shape = tuple(int(size) for size in reversed(tensor.shape))
        if not shape or 0 in shape:
            raise damaged(path, "GGUF")
        tensors[tensor.name] = StoredTensor(shape, partial(_read, tensor.data, kind, shape))
    return tensors, metadata


def _read(data: np.ndarray, kind: gguf.GGMLQuantizationType, shape: tuple[int, ...]) -> np.ndarray:
    """Dequantise a tensor; `data` is a view on the file, its last axis one row of numbers or of packed bytes."""
    out = np.empty(shape, np.float32)
    rows, packed = out.reshape(-1, shape[-1]), np.asarray(data).reshape(-1, data.shape[-1])
    for start in range(0, len(rows), _ROWS):
        rows[start : start + _ROWS] = dequantize(packed[start : start + _ROWS], kind)
    return out

"""Which language model weights are, in whatever storage."""

import hashlib
from dataclasses import dataclass

import numpy as np

from emollama_jax.io.paths import PathLike
from emollama_jax.weights.base_checkpoint import is_base_checkpoint, read_manifest
from emollama_jax.weights.sources import open_source
from emollama_jax.weights.tensors import WeightSource


@dataclass(frozen=True)
class ModelIdentity:
    """What tells one language model from another.

    Attributes:
        fingerprint: of the parameters as a base checkpoint stores them; "" for other weights.
        origin: of the tensors that they were made of, in whatever storage they are now; "" where that is not known.
    """

    fingerprint: str
    origin: str

    def may_be(self, other: "ModelIdentity") -> bool:
        """Returns whether this is the other model, as far as both are known."""
        pairs = ((self.fingerprint, other.fingerprint), (self.origin, other.origin))
        same = [one == two for one, two in pairs if one and two]
        return any(same) or not same


def identify_model(where: PathLike) -> ModelIdentity:
    """Returns the identity of a base checkpoint, or of other weights, whose tensors are all read for it."""
    if is_base_checkpoint(where):
        manifest = read_manifest(where)
        return ModelIdentity(manifest["fingerprint"], manifest.get("origin", ""))
    with open_source(where) as source:
        return ModelIdentity("", origin_of(source))


def origin_of(source: WeightSource) -> str:
    """Returns SHA-256 over names, dtypes, shapes and bytes of the tensors in files, one at a time."""
    digest = hashlib.sha256()
    for name in source.names():
        tensor = source.read(name)
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(np.ascontiguousarray(tensor).view(np.uint8).data if tensor.size else b"")
    return f"sha256:{digest.hexdigest()}"

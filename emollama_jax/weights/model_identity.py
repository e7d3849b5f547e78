"""Which language model weights are, in whatever storage."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from emollama_jax.errors import UserError
from emollama_jax.io.paths import PathLike
from emollama_jax.weights.base_checkpoint import is_base_checkpoint, read_manifest
from emollama_jax.weights.sources import open_source
from emollama_jax.weights.tensors import WeightSource

ANY_BASE = "put the adapters on this one all the same with --any-base"


@dataclass(frozen=True)
class ModelIdentity:
    """What tells one language model from another.

    Attributes:
        fingerprint: of the parameters as a base checkpoint stores them; "" for other weights.
        origin: of the tensors that they were made of, in whatever storage they are now; "" where that is not known.
    """

    fingerprint: str = ""
    origin: str = ""

    def __bool__(self) -> bool:
        """Whether anything is known."""
        return bool(self.fingerprint or self.origin)

    def may_be(self, other: "ModelIdentity") -> bool:
        """Returns whether this is the other model, as far as both are known."""
        pairs = ((self.fingerprint, other.fingerprint), (self.origin, other.origin))
        same = [one == two for one, two in pairs if one and two]
        return any(same) or not same

    def as_metadata(self) -> dict[str, str]:
        """Returns what files of adapters record of the language model that they were trained on."""
        record = {"base_fingerprint": self.fingerprint, "base_origin": self.origin}
        return {name: value for name, value in record.items() if value}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "ModelIdentity":
        """Returns what `as_metadata` recorded; nothing is known of other files."""
        return cls(*(str(metadata.get(name, "")) for name in ("base_fingerprint", "base_origin")))


UNKNOWN = ModelIdentity()


def check_base(
    trained: object, known: ModelIdentity, name: str, base: PathLike, found: ModelIdentity, *, otherwise: str = ANY_BASE
) -> None:
    """Checks that a language model is the one that adapters were trained on, as far as that is known.

    Args:
        trained: where the adapters are, for the message.
        known: the language model that they were trained on, and its `name`.
        base: the file or folder of the one that is at hand, which is `found`.
        otherwise: what else the user can do.

    Raises:
        UserError: it is another.
    """
    if not known.may_be(found):
        raise UserError(
            f"{trained} was trained on the language model {name or '(its name is not known)'}, and {base} is another, "
            f"by its fingerprint; give that one (--base), or {otherwise}"
        )


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

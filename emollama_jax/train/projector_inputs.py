"""What the projectors' inputs have in common over the training clips, and initial values that take it away.

Outputs of a frozen encoder are often a large vector that all clips share, and a small part that tells them apart. A
projector passes both on, and training has to take the first away before it finds the second. With
`train.center_projectors` new projectors begin without it, and `optimizer.center_projectors` keeps it out of the steps.

Axes: N clips, T tokens of an image, W their width, P patches of an image token, F feature size, I inputs of a
projector.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from emollama_jax.data.datasets import IndexedRecords
from emollama_jax.data.records import decode_frame
from emollama_jax.models.emotion_llama import EmotionLlama
from emollama_jax.sharding import constrain
from emollama_jax.text.prompts import FEATURES

CLIPS = 256  # clips that mean and variance are taken of; more would change them little


class Moments:
    """Mean and variance of a projector's inputs, clip by clip."""

    def __init__(self):
        self._count, self._sum, self._squares = 0, 0.0, 0.0

    def add(self, inputs: Float[np.ndarray, "*N I"]) -> None:
        """Takes inputs in."""
        inputs = inputs.reshape(-1, inputs.shape[-1]).astype(np.float64)
        self._count += len(inputs)
        self._sum += inputs.sum(0)
        self._squares += np.square(inputs).sum(0)

    @property
    def differ(self) -> bool:
        """Whether there are inputs that differ by more than rounding."""
        return bool(self._count and self.variance.sum() > 1e-9 * np.square(self.mean).sum())

    @property
    def mean(self) -> Float[np.ndarray, " I"]:
        return self._sum / self._count

    @property
    def variance(self) -> Float[np.ndarray, " I"]:
        return np.maximum(self._squares / self._count - np.square(self.mean), 0)


def projector_moments(model: EmotionLlama, datasets: Sequence[IndexedRecords]) -> dict[str, Moments]:
    """Measures the inputs of each projector, by its name, on up to `CLIPS` clips spread evenly over the data.

    A projector whose inputs none of these clips has, or all alike, is left out.

    Args:
        model: with its encoder where the data is of frames.
        datasets: the opened `config.data.train`.
    """
    moments = {name: Moments() for name in ("image_proj", "cls_proj", *(f"{feature}_proj" for feature in FEATURES))}
    for record in _spread(datasets):
        image = _image_tokens(model, record)
        patches = model.projectors.config.patches_per_token
        moments["cls_proj"].add(image[0])
        moments["image_proj"].add(image[1:].reshape(-1, patches * image.shape[-1]))
        for index, feature in enumerate(FEATURES):
            if record["has_feature"][index]:
                moments[f"{feature}_proj"].add(record["features"][index])
    return {name: inputs for name, inputs in moments.items() if inputs.differ}


def standardize_projectors(model: EmotionLlama, moments: Mapping[str, Moments]) -> None:
    """Scales and shifts new projectors in place: over the clips of `moments`, each kind of soft token then has the mean
    0 and a root mean square near that of the language model's embeddings.

    This is a data-dependent initialisation, as in arXiv:1602.07868 (section 3) and arXiv:1511.06856.
    """
    size = _root_mean_square(model.llama.embed.embedding[...])
    for name, inputs in moments.items():
        _standardize(getattr(model.projectors, name), inputs, size)


def _spread(datasets: Sequence[IndexedRecords]) -> Iterator[Mapping[str, Any]]:
    """Up to `CLIPS` records, spread evenly over the data sets."""
    total = sum(map(len, datasets))
    numbers = np.unique(np.linspace(0, total - 1, min(total, CLIPS)).astype(int))
    for dataset in datasets:
        inside = numbers[(numbers >= dataset.first) & (numbers < dataset.first + len(dataset))]
        yield from (dataset[int(number) - dataset.first] for number in inside)


def _image_tokens(model: EmotionLlama, record: Mapping[str, Any]) -> Float[np.ndarray, "T W"]:
    """EVA-ViT's tokens of a record: those stored, or of its frame."""
    if "image_tokens" in record:
        return record["image_tokens"]
    return np.asarray(_encode(model.eva_vit, decode_frame(record["frame"])[None]))[0]


@nnx.jit
def _encode(eva_vit: nnx.Module, frames: jax.Array) -> jax.Array:
    return constrain(eva_vit.encode(frames).astype(jnp.float32), None, None, None)  # whole on every process


@jax.jit
def _root_mean_square(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))


def _standardize(projector: nnx.Module, inputs: Moments, size: jax.Array) -> None:
    """Gives the outputs the mean 0 and, in expectation over kernels of independent numbers, the root mean square."""
    kernel, bias = projector.kernel[...], projector.bias[...]

    def standardized(kernel: jax.Array, mean: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
        kernel = kernel * (size / (_root_mean_square(kernel) * jnp.sqrt(total)))
        return kernel, -jnp.matmul(mean, kernel, precision="highest")

    place = jax.jit(standardized, out_shardings=(kernel.sharding, bias.sharding))
    mean, total = np.float32(inputs.mean), np.float32(inputs.variance.sum())
    projector.kernel[...], projector.bias[...] = place(kernel, mean, total)

"""Heads on stored features, without a language model: what each feature tells of the labels, and all together.

    inputs = read_inputs(train)                              # the features of all clips, by name
    head = fit_head(inputs, labels, numbers, names=("hubert",), settings=HeadSettings())
    predictions = head.predict(read_inputs(test))

For each feature the tokens of a clip are pooled by attention (one learned query), the pooled vectors stand side by
side, and one or two layers give the labels. Encoders' outputs are often one large vector that all clips share, and
small differences: each number of a feature is standardised by its mean and deviation over the training clips. What a
clip lacks is zeros.

A part of the training clips is held out, and the weight decay with the least loss on it is taken; clips that a head is
evaluated on have no part in that.

Axes: N clips, T tokens of a feature, W their width, L labels.
"""

import functools
import itertools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from emollama_jax.data.records import Records
from emollama_jax.errors import UserError
from emollama_jax.fields import check_fields, field
from emollama_jax.text.prompts import FEATURES
from emollama_jax.text.words import words

HEADS = ("linear", "mlp")
GRID = 4  # an image's tokens are averaged over a grid of at most so many rows and columns
WORDS = 1024  # places that words are hashed to
VIEWS = {"A": ("hubert",), "V": ("mae", "videomae", "frame"), "T": ("words",)}
HELD_OUT = 5  # one clip in so many

Inputs = Mapping[str, Float[np.ndarray, "N T W"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSettings:
    """How a head is trained; a value out of range is a ValueError that begins with its name."""

    head: str = field("mlp", choices=HEADS)
    """One linear layer, or two layers."""
    hidden: int = field(128, ge=1)
    """Width of the layer between two."""
    steps: int = field(300, ge=1)
    """Steps of Adam."""
    batch: int = field(256, ge=1)
    """Clips of a step."""
    learning_rate: float = field(0.03, gt=0)
    """At the first step; it falls to 0 along a cosine."""
    weight_decays: tuple[float, ...] = (1e-4, 1e-3, 1e-2)
    """Twice the factor of the squared kernels in the loss; the best by the held-out clips is taken."""
    seed: int = field(0, ge=0)
    """Of the held-out part, the initial weights and the batches."""

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True)
class Head:
    """A trained head.

    Attributes:
        names: the features it reads.
        statistics: of each, the mean and the deviation over the training clips.
        weight_decay: the one taken.
    """

    names: tuple[str, ...]
    labels: tuple[str, ...]
    params: Any
    statistics: Mapping[str, tuple[np.ndarray, np.ndarray]]
    weight_decay: float

    def predict(self, inputs: Inputs) -> list[str]:
        """Return the likeliest label of each clip."""
        return [self.labels[i] for i in self.log_probabilities(inputs).argmax(axis=-1)]

    def log_probabilities(self, inputs: Inputs) -> Float[np.ndarray, "N L"]:
        """Return the logarithms of the labels' probabilities."""
        chosen = _standardised(inputs, self.names, self.statistics)
        return np.asarray(jax.nn.log_softmax(_logits(self.params, chosen)))


def read_inputs(records: Records) -> dict[str, Float[np.ndarray, "N T W"]]:
    """Read the features of all clips of a split: mae, videomae, hubert and words, and the frame's where its tokens are
    stored (its class token and patches, averaged over a small grid)."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in (*FEATURES, "words")}
    for record in (records[i] for i in range(len(records))):
        has = np.asarray(record["has_feature"], bool)
        for name, feature, there in zip(FEATURES, np.asarray(record["features"], np.float32), has, strict=True):
            found[name].append((feature if there else np.zeros_like(feature))[None])
        found["words"].append(_hashed_words(record["subtitle"])[None])
        if "image_tokens" in record:
            found.setdefault("frame", []).append(_averaged(np.asarray(record["image_tokens"], np.float32)))
    return {name: np.stack(values) for name, values in found.items() if values}


def choose_inputs(inputs: Inputs) -> dict[str, tuple[str, ...]]:
    """List what is to be tried: each feature that any clip has, each view of several, and all together."""
    alone = {name: (name,) for name, values in inputs.items() if np.any(values)}
    views = {view: tuple(name for name in names if name in alone) for view, names in VIEWS.items()}
    return alone | {view: names for view, names in views.items() if len(names) > 1} | {"all": tuple(alone)}


def fit_head(
    inputs: Inputs,
    labels: Sequence[str],
    numbers: Int[np.ndarray, " N"],
    *,
    names: Sequence[str],
    settings: HeadSettings = HeadSettings(),
) -> Head:
    """Train a head on some of the features.

    Args:
        numbers: the place of each clip's label in `labels`.

    Raises:
        UserError: there are too few clips to hold some out.
    """
    if len(numbers) < HELD_OUT:
        raise UserError(f"{len(numbers)} labelled clips to train on; give {HELD_OUT} or more")
    statistics = {name: _statistics(inputs[name]) for name in names}
    chosen = _standardised(inputs, names, statistics)
    rest, held = _hold_out(numbers, settings.seed)
    take = lambda rows: ({name: values[rows] for name, values in chosen.items()}, jnp.asarray(numbers)[rows])
    key = jax.random.key(settings.seed)
    params = _init(key, {name: values.shape[-1] for name, values in chosen.items()}, len(labels), settings)
    decays = jnp.asarray(settings.weight_decays)
    plain = (settings.steps, settings.batch, settings.learning_rate)
    losses, found = _fit(params, take(rest), take(held), jax.random.fold_in(key, 1), decays, plain)
    best = int(np.argmin(losses))
    kept = jax.tree.map(lambda leaf: leaf[best], found)
    return Head(tuple(names), tuple(labels), kept, statistics, settings.weight_decays[best])


def _hold_out(numbers: Int[np.ndarray, " N"], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split the clips into those to train on and those to validate on, of every label alike."""
    drawn = np.lexsort((np.random.default_rng(seed).random(len(numbers)), numbers))
    held = np.arange(len(numbers)) % HELD_OUT == HELD_OUT // 2
    return drawn[~held], drawn[held]


def _hashed_words(text: str) -> Float[np.ndarray, " W"]:
    found = np.zeros(WORDS, np.float32)
    for word in words(text):
        found[zlib.crc32(word.encode()) % WORDS] = 1
    return found


def _averaged(tokens: Float[np.ndarray, "P W"]) -> Float[np.ndarray, "T W"]:
    """Average an image's patches, which follow its class token, over a grid of at most GRID x GRID."""
    side = int(len(tokens[1:]) ** 0.5)
    grid = tokens[1 : 1 + side * side].reshape(side, side, -1)
    parts = [np.array_split(row, min(GRID, side), axis=1) for row in np.array_split(grid, min(GRID, side), axis=0)]
    return np.stack([tokens[0], *(part.mean(axis=(0, 1)) for row in parts for part in row)])


def _statistics(values: Float[np.ndarray, "N T W"]) -> tuple[np.ndarray, np.ndarray]:
    """The mean and deviation of each number over the clips that have the feature."""
    there = values[np.any(values, axis=(1, 2))]
    there = there if len(there) else values
    deviation = there.std(axis=0)
    varying = (deviation > 0).sum(axis=-1, keepdims=True)
    return there.mean(axis=0), np.where(deviation > 0, deviation, 1) * np.sqrt(np.maximum(varying, 1))


def _standardised(
    inputs: Inputs, names: Sequence[str], statistics: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> dict[str, Array]:
    chosen = {}
    for name in names:
        mean, deviation = statistics[name]
        there = np.any(inputs[name], axis=(1, 2), keepdims=True)
        chosen[name] = jnp.asarray(np.where(there, (inputs[name] - mean) / deviation, 0), jnp.float32)
    return chosen


def _init(key: Array, widths: Mapping[str, int], labels: int, settings: HeadSettings) -> dict[str, Any]:
    sizes = [sum(widths.values()), *([settings.hidden] if settings.head == "mlp" else []), labels]
    layers = []
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        inputs = fan_in if i else len(widths)  # the squared length of what comes in
        kernel = jax.random.normal(jax.random.fold_in(key, i), (fan_in, fan_out)) * (2 / inputs) ** 0.5
        if i == len(sizes) - 2:
            kernel = 0 * kernel  # the first answers are all alike
        layers.append({"kernel": kernel, "bias": jnp.zeros(fan_out)})
    return {"queries": {name: jnp.zeros(width) for name, width in widths.items()}, "layers": layers}


def _logits(params: Any, inputs: Mapping[str, Array]) -> Float[Array, "N L"]:
    pooled = []
    for name in sorted(inputs):
        values = inputs[name]
        weights = jax.nn.softmax(values @ params["queries"][name], axis=-1)
        pooled.append(jnp.einsum("nt,ntw->nw", weights, values))
    x = jnp.concatenate(pooled, axis=-1)
    *hidden, last = params["layers"]
    for layer in hidden:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ last["kernel"] + last["bias"]


def _loss(params: Any, data: tuple[Mapping[str, Array], Array]) -> Array:
    inputs, numbers = data
    return optax.softmax_cross_entropy_with_integer_labels(_logits(params, inputs), numbers).mean()


@functools.partial(jax.jit, static_argnames="plain")
def _fit(
    params: Any, train: Any, held: Any, key: Array, weight_decays: Array, plain: tuple[int, int, float]
) -> tuple[Array, Any]:
    """(losses on the held-out clips, parameters) under each weight decay, which is the leading axis.

    Args:
        train, held: inputs and numbers.
        plain: steps, clips of a step, and learning rate.
    """
    steps, batch, learning_rate = plain
    clips = len(train[1])
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    def fit(weight_decay):
        def loss(params, key):
            drawn = jax.random.randint(key, (batch,), 0, clips)
            some = jax.tree.map(lambda x: x[drawn], train)
            squares = sum(jnp.sum(layer["kernel"] ** 2) for layer in params["layers"])
            return _loss(params, some) + weight_decay / 2 * squares

        def step(carry, key):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, key), state)
            return (optax.apply_updates(params, updates), state), None

        (fitted, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, steps))
        return _loss(fitted, held), fitted

    return jax.vmap(fit)(weight_decays)

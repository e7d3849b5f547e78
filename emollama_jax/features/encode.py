"""Batches of clips through an encoder, with a handful of compiled programs whatever the clips' number and length.

The rows of a batch are split over the devices that hold the parameters.

Axes: N clips or images, t frames, I x J pixels, S samples, D width.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, UInt8

from emollama_jax.config import DEFAULT_SHARDING
from emollama_jax.errors import UserError
from emollama_jax.media.audio import SAMPLE_RATE
from emollama_jax.models.eva_vit import EvaVit
from emollama_jax.models.hubert import Hubert
from emollama_jax.models.mae import Mae
from emollama_jax.models.videomae import VideoMae
from emollama_jax.sharding import AxisRules, use_mesh

# Compiled lengths of audio, in seconds: two to an octave, so that at most a third of a row is padding.
BUCKETS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)

SIZES = (1, 4)  # of batches that are filled: a program for one alone, and one for many
ENCODED = (*SIZES, 16)  # of frames or faces that are encoded together; a clip has many faces
Things = TypeVar("Things")


def in_batches(things: Sequence[Things], sizes: Sequence[int] = SIZES) -> list[Sequence[Things]]:
    """Split a sequence into batches of these sizes, each filled: seven things into four, one, one and one."""
    batches, start = [], 0
    while start < len(things):
        size = max(size for size in sizes if size <= len(things) - start)
        batches.append(things[start : start + size])
        start += size
    return batches


def encode_images(
    model: EvaVit | Mae | VideoMae,
    images: UInt8[np.ndarray, "N ..."],
    *,
    batch_size: int = 8,
    sizes: Sequence[int] = (),
) -> Float[np.ndarray, "N ... D"]:
    """`model.encode` of frames, faces or clips of frames (`media/images.py`), `batch_size` at a time, float32.

    EVA-ViT gives tokens [N, T, D], MAE and VideoMAE vectors [N, D].

    Args:
        sizes: the batches that there are, 1 among them, each filled; default: on a single CPU, where a row of padding
            takes as long as any other, `ENCODED` up to `batch_size`; elsewhere one size, padded at the end.
    """
    graphdef, state = nnx.split(model)
    mesh, sizes = _mesh_of(state), sizes or _sizes_of(state)
    like = jax.eval_shape(lambda state, x: run_encoder(graphdef, state, x), state, _filled(images[:0], 1))
    outputs = np.empty((len(images), *like.shape[1:]), np.float32)
    for part, rows in _batches(list(range(len(images))), batch_size, mesh, sizes):
        outputs[part] = _run(mesh, graphdef, state, _filled(images[part], rows))[: len(part)]
    return outputs


def encode_audio(
    model: Hubert,
    waveforms: Sequence[Float[np.ndarray, " _"]],
    *,
    batch_seconds: int = 64,
    sizes: Sequence[int] = (),
) -> Float[np.ndarray, "N D"]:
    """`model.encode` of prepared waveforms (`media/audio.py`), in batches of similar length, float32.

    A clip's vector does not depend on the others, nor on how far it is padded.

    Args:
        batch_seconds: audio that is on the device at once; one clip may be longer.
        sizes: the batches that there are, as of `encode_images`; default: one size for each length.

    Raises:
        UserError: a clip that is shorter than one frame, or longer than the longest bucket; none is encoded then.
    """
    graphdef, state = nnx.split(model)
    mesh = _mesh_of(state)
    outputs = np.empty((len(waveforms), model.config.hidden_size), np.float32)
    by_bucket: dict[int | float, list[int]] = {}
    for index, waveform in enumerate(waveforms):
        by_bucket.setdefault(_bucket(model, waveform, index), []).append(index)
    for seconds, clips in sorted(by_bucket.items()):
        for batch, size in _batches(clips, max(1, int(batch_seconds / seconds)), mesh, sizes):
            rows = np.zeros((size, int(seconds * SAMPLE_RATE)), np.float32)
            lengths = np.full(size, model.config.min_samples, np.int32)
            for row, index in enumerate(batch):
                lengths[row] = len(waveforms[index])
                rows[row, : lengths[row]] = waveforms[index]
            outputs[batch] = _run(mesh, graphdef, state, rows, lengths)[: len(batch)]
    return outputs


def _bucket(model: Hubert, waveform: Float[np.ndarray, " S"], index: int) -> int | float:
    """The compiled length, in seconds, that serves a waveform."""
    samples, least = len(waveform), model.config.min_samples
    if samples < least:
        raise UserError(f"clip {index}: {samples} samples of audio, fewer than one frame's {least}; leave it out")
    for seconds in BUCKETS:
        if samples <= seconds * SAMPLE_RATE:
            return seconds
    raise UserError(f"clip {index}: {samples / SAMPLE_RATE:.0f} s of audio, more than {BUCKETS[-1]} s; cut it shorter")


def _mesh_of(state: nnx.State) -> Mesh | None:
    """The devices that hold the parameters; None for one alone."""
    held = _held(state)
    return held.mesh if isinstance(held, NamedSharding) and held.mesh.size > 1 else None


def _sizes_of(state: nnx.State) -> Sequence[int]:
    """The batches to fill where the parameters lie; none where batches are of one size."""
    platforms = [device.platform for device in _held(state).device_set]
    return ENCODED if platforms == ["cpu"] else ()


def _held(state: nnx.State) -> jax.sharding.Sharding:
    return jax.tree.leaves(state)[0].sharding


def _run(mesh: Mesh | None, graphdef: nnx.GraphDef, state: nnx.State, *inputs: np.ndarray) -> np.ndarray:
    """An encoder's features of its inputs, whose rows are split over the mesh."""
    if mesh is None:
        return np.asarray(run_encoder(graphdef, state, *inputs))
    with use_mesh(mesh, split_rows(mesh)):
        return np.asarray(run_encoder(graphdef, state, *jax.device_put(inputs, row_sharding(mesh))))


def row_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an encoder's inputs: their rows over all devices."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def split_rows(mesh: Mesh) -> AxisRules:
    """The sharding rules within an encoder: rows over all devices, parameters on each."""
    return tuple((name, mesh.axis_names if name == "batch" else None) for name, _ in DEFAULT_SHARDING)


def _batches(
    numbers: Sequence[int], limit: int, mesh: Mesh | None, sizes: Sequence[int]
) -> Iterator[tuple[Sequence[int], int]]:
    """Yield the numbers of each batch, and its rows: up to `limit`, or one of `sizes`."""
    devices = mesh.size if mesh else 1
    if sizes:
        for batch in in_batches(numbers, [size for size in sizes if size <= limit] or [1]):
            yield batch, -(-len(batch) // devices) * devices
        return
    rows = _rows(len(numbers), limit, devices)
    for start in range(0, len(numbers), rows):
        yield numbers[start : start + rows], rows


def _rows(count: int, limit: int, devices: int) -> int:
    """Rows of a batch: `limit`, or the power of two that holds `count` where that is less, up to what `devices` can
    share."""
    rows = min(limit, 1 << max(0, count - 1).bit_length())
    return -(-rows // devices) * devices


def _filled(batch: np.ndarray, rows: int) -> np.ndarray:
    """The batch with zeros in the rows that it lacks."""
    return np.concatenate([batch, np.zeros((rows - len(batch), *batch.shape[1:]), batch.dtype)])


@functools.partial(jax.jit, static_argnames="graphdef")
def run_encoder(graphdef, state, *inputs):
    """An encoder's features of its inputs, as its `encode` takes them."""
    return nnx.merge(graphdef, state).encode(*inputs)

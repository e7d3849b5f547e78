"""Batches for training and evaluation: records, drawn, tokenised, packed and placed, in an order that can be resumed.

    dataset = train_dataset(config, tokenizer)
    iterator = iter(dataset)
    batch = next(iterator); state = iterator.get_state(); iterator.set_state(state)

The order is a function of the seed alone. A batch is made in parts, one a process when a run begins; each takes every
n-th sample of one stream. Worker processes only decode, so that neither a batch nor the state depends on their number.
The state is a small dict and exact at every point, with workers and prefetching too. Close an iterator after use.

Axes: B rows, T positions, K clips a row.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from emollama_jax.config import Config, DataConfig
from emollama_jax.data.batch import Batch, batch_sharding, soft_tokens_per_clip
from emollama_jax.data.batch_shards import JoinedParts, ProcessRows, StreamReader, rows_per_shard
from emollama_jax.data.datasets import AnswerableRecords, IndexedRecords, find_images, open_datasets
from emollama_jax.data.packing import pack_rows, place_samples
from emollama_jax.data.transforms import SampleTransform
from emollama_jax.errors import UserError
from emollama_jax.models.emotion_llama import num_image_tokens
from emollama_jax.text.prompts import Sample
from emollama_jax.text.tokenizers import Tokenizer

TOKEN_ARRAYS = ("tokens", "soft", "is_answer")  # the others have one entry a clip


def train_dataset(
    config: Config, tokenizer: Tokenizer, *, shard_index: int = 0, num_shards: int = 1, epochs: int | None = None
) -> grain.IterDataset:
    """Make packed batches of the data sets `config.data.train`, shuffled anew in every epoch.

    Args:
        shard_index: which of `num_shards` equal parts of every batch's rows (see `process_shard`).
        epochs: how often each clip comes, whatever `data.weights` say; one process then sees all clips, and empty rows
            fill its last batch. Default: without end.

    Raises:
        UserError: the data does not exist, was prepared for another model, or has no answers for `prompt.tasks`.
    """
    data = config.data
    _check_layout(config)
    datasets = open_datasets(data.train, config, "data.train")
    images = find_images(datasets)
    names = (*TOKEN_ARRAYS, "clip", "features", images)
    transform = make_sample_transform(config, tokenizer)
    if data.modality_dropout:
        names = (*names, "has_image")
        options = {name: getattr(data, name) for name in ("modality_dropout", "dropout_view_weights")}
        transform = dataclasses.replace(transform, **options)
    chosen = [AnswerableRecords.select(dataset, config) for dataset in datasets]
    for path, records in zip(data.train, chosen, strict=True):
        if not records:
            raise UserError(
                f"data.train: no clip of {path} has an answer for prompt.tasks={config.prompt.tasks} with "
                "prompt.labels; choose other tasks, labels or data"
            )
    streams = [grain.MapDataset.source(records).seed(config.seed + i) for i, records in enumerate(chosen)]
    if epochs is not None:
        stream = grain.MapDataset.concatenate(streams).seed(config.seed).shuffle().repeat(epochs)
    else:
        weights = data.weights or [len(records) for records in chosen]
        stream = grain.MapDataset.mix([stream.shuffle().repeat() for stream in streams], weights=weights)
    stream = stream.seed(config.seed).random_map(transform)
    rows = grain.experimental.FirstFitPackIterDataset(
        _read(stream[shard_index::num_shards], config).map(functools.partial(_by_reference, name=images)),
        length_struct={name: data.sequence_length if name in TOKEN_ARRAYS else data.clips_per_row for name in names},
        num_packing_bins=data.packing_rows,
        seed=config.seed,
        max_sequences_per_bin=data.clips_per_row,
    )
    shard_rows = rows_per_shard(config, num_shards)
    pad = functools.partial(grain.experimental.batch_and_pad, batch_size=shard_rows)
    batches = rows.batch(shard_rows, drop_remainder=False, batch_fn=pad)
    settings = {"soft_per_clip": soft_tokens_per_clip(config), "loss_average": config.train.loss_average}
    return batches.map(functools.partial(_make_batch, **settings))


def train_batches(config: Config, tokenizer: Tokenizer, rows: ProcessRows) -> grain.IterDataset:
    """Make a process's rows of the batches; see `train_dataset`.

    Args:
        rows: as `process_rows` chooses them.
    """
    part = lambda index: train_dataset(config, tokenizer, shard_index=index, num_shards=rows.num_parts)
    return JoinedParts([part(index) for index in rows.parts], rows)


def eval_dataset(
    config: Config, tokenizer: Tokenizer, *, shard_index: int = 0, num_shards: int = 1
) -> grain.IterDataset:
    """Make batches of the data sets `config.data.eval`: every clip once, in order, one a row.

    Row r of shard i of n in the b-th batch holds the clip b B + r n + i. Empty rows fill the last batch, so that each
    shard has as many batches. A clip without an answer has no targets.
    """
    _check_layout(config)
    datasets = open_datasets(config.data.eval, config, "data.eval")
    shard_rows = rows_per_shard(config, num_shards)
    rows = EvalRows(datasets, config, tokenizer, multiple=shard_rows * num_shards)
    return _read(grain.MapDataset.source(rows)[shard_index::num_shards], config).batch(shard_rows, drop_remainder=True)


class EvalRows:
    """Rows of one clip each, arrays without their axis B, as a source for grain; empty ones up to a `multiple`."""

    def __init__(self, datasets: Sequence[IndexedRecords], config: Config, tokenizer: Tokenizer, *, multiple: int):
        self._datasets, self._config = datasets, config
        self._transform = make_sample_transform(config, tokenizer)
        self._images = find_images(datasets)
        self._clips = datasets[-1].first + len(datasets[-1])
        self._length = -(-self._clips // multiple) * multiple

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Batch:
        config, number = self._config, min(index, self._clips - 1)
        dataset = next(dataset for dataset in reversed(self._datasets) if number >= dataset.first)
        element = self._transform.random_map(
            dataset[number - dataset.first], np.random.default_rng((config.seed, number))
        )
        sample = Sample(element["tokens"], element["soft"], element["is_answer"])
        row = pack_rows(
            [[sample] if index == number else []],
            length=config.data.sequence_length,
            clips_per_row=1,
            soft_per_clip=soft_tokens_per_clip(config),
            loss_average=config.train.loss_average,
        )
        clips = {name: element[name] for name in ("features", self._images)}
        clip = element["clip"] if index == number else np.array([-1], np.int32)
        return dataclasses.replace(jax.tree.map(lambda x: x[0], row), clip=clip, **clips)


def make_sample_transform(config: Config, tokenizer: Tokenizer) -> SampleTransform:
    """Make the transform from records to samples."""
    image_tokens = num_image_tokens(config.eva_vit, config.projectors)
    return SampleTransform(tokenizer, config.prompt, config.data.sequence_length, image_tokens)


def _check_layout(config: Config) -> None:
    if config.prompt.layout != "trained":
        raise UserError(
            f"prompt.layout={config.prompt.layout}: answers are learnt in the layout trained only; set that"
        )


def _read(stream: grain.MapDataset, config: Config) -> grain.IterDataset:
    """Read ahead, by threads or in worker processes, in the stream's order."""
    return StreamReader(stream, functools.partial(_read_ahead, data=config.data))


def _read_ahead(stream: grain.MapDataset, data: DataConfig) -> grain.IterDataset:
    ahead, workers = data.read_ahead, data.workers
    if not workers:
        return stream.to_iter_dataset(grain.ReadOptions(num_threads=8, prefetch_buffer_size=ahead))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's workers read one; our command line has no other use for them
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=max(1, ahead // workers))
    return stream.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)).mp_prefetch(options)


def _by_reference(element: Mapping[str, np.ndarray], *, name: str) -> dict[str, np.ndarray]:
    """Put a reference in place of an image of megabytes: packing copies that, and `_stack_images` the image, once."""
    reference = np.empty(1, object)
    reference[0] = element[name][0]
    return {**element, name: reference}


def _stack_images(references: np.ndarray, clip_mask: np.ndarray) -> np.ndarray:
    """Copy the images [...] that `references` [B, K] hold to an array [B, K, ...]; zeros where there is no clip."""
    first = references[clip_mask][0]
    images = np.zeros((*references.shape, *first.shape), first.dtype)
    for place in zip(*np.nonzero(clip_mask), strict=True):
        images[place] = references[place]
    return images


def _make_batch(rows: Mapping[str, np.ndarray], *, soft_per_clip: int, loss_average: str) -> Batch:
    """Make the batch of rows as grain packs them."""
    segment_ids, positions = (rows[f"tokens_{name}"].astype(np.int32) for name in ("segment_ids", "positions"))
    columns = {name: rows[name] for name in TOKEN_ARRAYS}
    placed = place_samples(
        **columns,
        segment_ids=segment_ids,
        positions=positions,
        soft_per_clip=soft_per_clip,
        loss_average=loss_average,
    )
    clip_mask = rows["clip_segment_ids"] > 0
    return dataclasses.replace(
        placed,
        features=rows["features"],
        clip_mask=clip_mask,
        clip=np.where(clip_mask, rows["clip"], -1).astype(np.int32),
        has_image=rows.get("has_image"),
        **{name: _stack_images(rows[name], clip_mask) for name in ("frames", "image_tokens") if name in rows},
    )


def onto_devices(dataset: grain.IterDataset, config: Config, mesh: Mesh) -> grain.IterDataset:
    """Make the batches global arrays on the mesh, `config.data.prefetch` of them ahead of the one in use."""

    def global_array(local: np.ndarray) -> jax.Array:
        sharding = batch_sharding(mesh, config.sharding, (config.data.batch_rows, *local.shape[1:]))
        return jax.make_array_from_process_local_data(sharding, local)

    batches = dataset.map(lambda batch: jax.tree.map(global_array, batch))
    return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=config.data.prefetch)

"""Batches for training and evaluation: records, drawn, tokenised, packed and placed, in an order that can be resumed.

    dataset = train_dataset(config, tokenizer)
    iterator = iter(dataset)
    batch = next(iterator); state = iterator.get_state(); iterator.set_state(state)

The order is a function of the seed alone: of the number of processes, each takes every n-th sample of one stream, and
worker processes only decode, so that a batch does not depend on how many there are. The state is a small dict that
holds at every point, with workers and prefetching too. Close an iterator when it is not needed any more.

Axes: B rows, T positions, K clips a row, S soft tokens a clip.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding

from emollama_jax.config import Config
from emollama_jax.data.packing import pack_rows, place_samples
from emollama_jax.data.records import Records
from emollama_jax.data.transforms import ToSample, tasks_of
from emollama_jax.errors import UserError
from emollama_jax.models.emotion_llama import image_tokens_of
from emollama_jax.sharding import AxisRules, partition_spec
from emollama_jax.text.prompts import Sample
from emollama_jax.text.tokenizers import Tokenizer

TOKEN_ARRAYS = ("tokens", "soft", "is_answer")  # the others have one entry a clip


@dataclass(frozen=True)
class IndexedRecords:
    """Records with their number among those of several data sets, by which a batch's clips can be named, and the labels
    of their own."""

    records: Records
    first: int

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.records[index] | {"number": self.first + index, "labels": self.records.metadata["labels"]}


@dataclass(frozen=True)
class Answerable:
    """The records that have an answer for any of the tasks."""

    source: IndexedRecords
    indices: tuple[int, ...]

    @classmethod
    def of(cls, source: IndexedRecords, config: Config) -> "Answerable":
        metadata = source.records.metadata
        rows = zip(*metadata["answers"][source.records.split].values(), strict=True)
        known = lambda row: {
            "labels": metadata["labels"],
            "emotion": row[0],
            "caption_coarse": "x" * row[1],
            "caption_fine": "x" * row[2],
        }
        return cls(source, tuple(i for i, row in enumerate(rows) if tasks_of(known(row), config.prompt)))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[self.indices[index]]


def open_sources(paths: Sequence[str], config: Config, where: str) -> list[IndexedRecords]:
    """The data sets FOLDER:SPLIT, numbered through.

    Raises:
        UserError: none is given, one is not there, or was prepared for another model than `config`'s; `where` is the
            field that names them.
    """
    if not paths:
        raise UserError(f"{where}: no data; give prepared data sets as FOLDER:SPLIT")
    sources, first = [], 0
    for path in paths:
        folder, found, split = path.rpartition(":")
        if not found:
            raise UserError(f"{where}: {path!r} names no split; write FOLDER:SPLIT")
        sources.append(IndexedRecords(Records(folder, split), first))
        _check_recipe(sources[-1].records, config)
        first += len(sources[-1])
    encoders_of(sources)
    return sources


def _check_recipe(records: Records, config: Config) -> None:
    """That the records are of the sizes that the model has."""
    recipe, eva_vit = records.metadata["recipe"], config.eva_vit
    expected = {"feature_size": config.projectors.feature_size}
    if recipe["image_storage"] == "frame":
        expected["size"] = eva_vit.image_size
    else:
        expected["image_tokens_shape"] = [1 + eva_vit.grid**2, eva_vit.hidden_size]
    for name, wanted in expected.items():
        found = list(recipe[name]) if isinstance(wanted, list) else recipe[name]
        if found != wanted:
            raise UserError(f"prepared with {name}={found}, the model has {wanted}: {records.path}; prepare it for it")


def encoders_of(sources: Sequence[IndexedRecords]) -> dict[str, str]:
    """The fingerprints of the encoders that computed the features and, as `eva_vit`, the image tokens, as far as the
    data sets know.

    Raises:
        UserError: they are of different ones.
    """
    known: dict[str, tuple[str, Path]] = {}
    for records in (source.records for source in sources):
        recipe = records.metadata["recipe"]
        for name, fingerprint in recipe["encoders"].items():
            before, path = known.setdefault(name, (fingerprint, records.path))
            if before != fingerprint:
                raise UserError(
                    f"{name} features of different encoders or settings cannot be mixed: {path} ({before}) and "
                    f"{records.path} ({fingerprint}); extract one of them again as the other was"
                )
    return {name: fingerprint for name, (fingerprint, _) in known.items()}


def frame_rules_of(sources: Sequence[IndexedRecords]) -> list[str] | None:
    """The rules by which the data sets' frames were taken, each once, in order; None where one does not say."""
    rules = {source.records.metadata["recipe"].get("frame_rule") for source in sources}
    return None if None in rules else sorted(rules)


def name_of(sources: Sequence[IndexedRecords], number: int) -> str:
    """The name of the clip with this number."""
    source = next(source for source in reversed(sources) if number >= source.first)
    return source.records[number - source.first]["name"]


def train_dataset(
    config: Config, tokenizer: Tokenizer, *, share: tuple[int, int] = (0, 1), epochs: int | None = None
) -> grain.IterDataset:
    """Packed batches of the data sets `config.data.train`, shuffled anew in every epoch.

    Args:
        share: (i, n): the i-th of n equal parts of every batch (see `process_share`).
        epochs: how often each clip comes, whatever `data.weights` say, for a look at all of them by one process, whose
            last batch is padded with empty rows; default: without end.

    Raises:
        UserError: there is no such data, it was prepared for another model, or has no answers to what is asked.
    """
    data, (index, count) = config.data, share
    _check_layout(config)
    sources = open_sources(data.train, config, "data.train")
    names = ("tokens", "soft", "is_answer", "clip", "cut", "features", image_of(sources))
    chosen = [Answerable.of(source, config) for source in sources]
    for path, answerable in zip(data.train, chosen, strict=True):
        if not answerable:
            raise UserError(
                f"data.train: no clip of {path} has an answer for prompt.tasks={config.prompt.tasks} with "
                "prompt.labels; choose other tasks, labels or data"
            )
    streams = [grain.MapDataset.source(one).seed(config.seed + i) for i, one in enumerate(chosen)]
    if epochs is not None:
        stream = grain.MapDataset.concatenate(streams).seed(config.seed).shuffle().repeat(epochs)
    else:
        weights = data.weights or [len(one) for one in chosen]
        stream = grain.MapDataset.mix([stream.shuffle().repeat() for stream in streams], weights=weights)
    stream = stream.seed(config.seed).random_map(to_sample_of(config, tokenizer))
    rows = grain.experimental.FirstFitPackIterDataset(
        _read(stream[index::count], config),
        length_struct={name: data.sequence_length if name in TOKEN_ARRAYS else data.clips_per_row for name in names},
        num_packing_bins=data.packing_rows,
        seed=config.seed,
        max_sequences_per_bin=data.clips_per_row,
    )
    rows_each = rows_of_share(config, count)
    pad = functools.partial(grain.experimental.batch_and_pad, batch_size=rows_each)
    batches = rows.batch(rows_each, drop_remainder=False, batch_fn=pad)
    return batches.map(functools.partial(_placed, soft_per_clip=soft_per_clip(config)))


def eval_dataset(config: Config, tokenizer: Tokenizer, *, share: tuple[int, int] = (0, 1)) -> grain.IterDataset:
    """Batches of the data sets `config.data.eval`: every clip once, in their order, one a row. Empty rows fill the last
    batch up, so that each process has as many. A clip without an answer has no targets.

    Row r of process i of n in the b-th batch holds the clip b B + r n + i.
    """
    index, count = share
    _check_layout(config)
    sources = open_sources(config.data.eval, config, "data.eval")
    rows_each = rows_of_share(config, count)
    rows = grain.MapDataset.source(EvaluationRows(sources, config, tokenizer, rows_each * count))[index::count]
    return _read(rows, config).batch(rows_each, drop_remainder=True)


class EvaluationRows:
    """Rows of one clip each, as a source for grain."""

    def __init__(self, sources: Sequence[IndexedRecords], config: Config, tokenizer: Tokenizer, multiple: int):
        self._sources, self._config = sources, config
        self._to_sample = to_sample_of(config, tokenizer)
        self._image = image_of(sources)
        self._clips = sources[-1].first + len(sources[-1])
        self._length = -(-self._clips // multiple) * multiple

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        number = min(index, self._clips - 1)
        which = max(i for i, source in enumerate(self._sources) if number >= source.first)
        record = self._sources[which][number - self._sources[which].first]
        element = self._to_sample.random_map(record, np.random.default_rng((self._config.seed, number)))
        sample = Sample(element["tokens"], element["soft"], element["is_answer"])
        row = pack_rows(
            [[sample] if index == number else []],
            length=self._config.data.sequence_length,
            clips_per_row=1,
            soft_per_clip=soft_per_clip(self._config),
        )
        row = {name: value[0] for name, value in row.items()}
        row |= {name: element[name] for name in ("clip", "cut", "features", self._image)}
        return row if index == number else row | {"clip": np.array([-1], np.int32), "cut": np.array([False])}


def to_sample_of(config: Config, tokenizer: Tokenizer) -> ToSample:
    """The transform of records."""
    return ToSample(tokenizer, config.prompt, config.data.sequence_length, soft_per_clip(config) - 4)


def _check_layout(config: Config) -> None:
    if config.prompt.layout != "trained":
        raise UserError(
            f"prompt.layout={config.prompt.layout}: answers are learnt in the layout trained only; set that"
        )


def soft_per_clip(config: Config) -> int:
    """Soft tokens S of a clip."""
    return image_tokens_of(config.eva_vit, config.projectors) + 4


def image_of(sources: Sequence[IndexedRecords]) -> str:
    """How all of the data sets keep their images: "frames" or "image_tokens".

    Raises:
        UserError: they differ in it, or in the encoder.
    """
    recipes = [source.records.metadata["recipe"] for source in sources]
    kinds = {(recipe["image_storage"], recipe["encoders"].get("eva_vit")) for recipe in recipes}
    if len(kinds) > 1:
        kept = zip(sources, recipes, strict=True)
        found = "; ".join(f"{source.records.path}: {recipe['image_storage']}" for source, recipe in kept)
        raise UserError(f"data sets of different images or encoders cannot be mixed: {found}; prepare them alike")
    return "frames" if kinds.pop()[0] == "frame" else "image_tokens"


def rows_of_share(config: Config, count: int) -> int:
    """Rows of one of `count` shares of a batch. Raises UserError when they are not equal."""
    rows = config.data.batch_rows
    if rows % count:
        raise UserError(f"data.batch_rows={rows}: must be a multiple of the {count} processes")
    return rows // count


def _read(stream: grain.MapDataset, config: Config) -> grain.IterDataset:
    """Reads ahead, by threads or in worker processes; the order is the stream's either way."""
    ahead, workers = config.data.read_ahead, config.data.workers
    if not workers:
        return stream.to_iter_dataset(grain.ReadOptions(num_threads=8, prefetch_buffer_size=ahead))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's workers read one; our command line has no other use for them
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=max(1, ahead // workers))
    return stream.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)).mp_prefetch(options)


def _placed(rows: Mapping[str, np.ndarray], *, soft_per_clip: int) -> dict[str, np.ndarray]:
    """Rows as grain packs them, as the model reads them."""
    segment_ids, positions = (rows[f"tokens_{name}"].astype(np.int32) for name in ("segment_ids", "positions"))
    columns = {name: rows[name] for name in TOKEN_ARRAYS}
    placed = place_samples(**columns, segment_ids=segment_ids, positions=positions, soft_per_clip=soft_per_clip)
    clip_mask = rows["clip_segment_ids"] > 0
    clips = {name: rows[name] for name in ("cut", "features", "frames", "image_tokens") if name in rows}
    return placed | clips | {"clip_mask": clip_mask, "clip": np.where(clip_mask, rows["clip"], -1).astype(np.int32)}


def batch_sharding(mesh: Mesh, rules: AxisRules, shape: Sequence[int]) -> NamedSharding:
    """Where the rows of an array [B, ...] of a batch lie."""
    axes = ("batch", *[None] * (len(shape) - 1))
    return NamedSharding(mesh, partition_spec(axes, shape, dict(mesh.shape), rules))


def process_share(config: Config, mesh: Mesh) -> tuple[int, int]:
    """(i, n): which of n equal parts of every batch this process reads, so that its devices find their rows in it.
    Processes whose devices hold the same rows read the same part.

    Raises:
        UserError: the rows cannot be split over the mesh alike.
    """
    sharding = batch_sharding(mesh, config.sharding, (config.data.batch_rows,))
    rows_of: dict[int, set[tuple[int, int]]] = {}
    for device, (rows,) in sharding.devices_indices_map((config.data.batch_rows,)).items():
        start, stop, _ = rows.indices(config.data.batch_rows)
        rows_of.setdefault(device.process_index, set()).add((start, stop))
    shares = sorted({tuple(sorted(rows)) for rows in rows_of.values()})
    if sum(stop - start for share in shares for start, stop in share) != config.data.batch_rows:
        raise UserError(
            f"data.batch_rows={config.data.batch_rows}: the mesh splits them unevenly over processes; give a multiple "
            "of the mesh's data x fsdp"
        )
    return shares.index(tuple(sorted(rows_of[jax.process_index()]))), len(shares)


def onto_devices(dataset: grain.IterDataset, config: Config, mesh: Mesh) -> grain.IterDataset:
    """The batches as global arrays on the mesh, `config.data.prefetch` of them ahead of the one in use."""

    def place(batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        def global_array(local: np.ndarray) -> jax.Array:
            sharding = batch_sharding(mesh, config.sharding, (config.data.batch_rows, *local.shape[1:]))
            return jax.make_array_from_process_local_data(sharding, local)

        return {name: global_array(local) for name, local in batch.items()}

    return grain.experimental.ThreadPrefetchIterDataset(dataset.map(place), prefetch_buffer_size=config.data.prefetch)

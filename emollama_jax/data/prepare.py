"""Data sets on disk: clip records in ArrayRecord files with TFDS's metadata, written out of parts.

    prepared = prepare("merr", annotations, Path("data"), Recipe(labels=MERR), PartMaker(workers=8))
    records = Records(prepared.path, "train")

A data set lies in NAME/STORAGE/VERSION, where STORAGE says how the image is kept: `frame` or `image_tokens`. Serialised
records go from the parts into the data set as they are.
"""

import contextlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from emollama_jax import __version__
from emollama_jax.data.annotations import Annotations, Clip
from emollama_jax.data.parts import count_records, read_header, read_records, write_array_record
from emollama_jax.data.problems import Problem
from emollama_jax.data.recipe import Recipe
from emollama_jax.data.records import CLIP_INFO_FILE, answers_of
from emollama_jax.errors import UserError
from emollama_jax.io.atomic import atomic_folder
from emollama_jax.io.json_lines import write_json_lines
from emollama_jax.io.locks import exclusive_lock
from emollama_jax.io.paths import PathLike, as_path

VERSION = "1.0.0"
SHARD_BYTES = 2**29  # of a file of records, about
DATASETS = {
    "merr": "MERR: coarse and fine captions of emotions (Emotion-LLaMA, NeurIPS 2024).",
    "mer2023": "MER2023: six emotions, semi-supervised.",
    "mer2024": "MER2024: six emotions, semi-supervised.",
    "mer2025": "MER2025: six emotions, the labelled clips of its first track.",
    "dfew": "DFEW: seven emotions in film clips.",
    "clips": "Clips of the user's own.",
}

MakeParts = Callable[[Sequence[Clip], Recipe, epath.Path], list[epath.Path]]


@dataclass(frozen=True)
class PreparedDataset:
    """A data set on disk: its folder, the clips in each split, the clips put aside, and whether it was there before."""

    path: epath.Path
    counts: dict[str, int]
    problems: tuple[Problem, ...]
    was_there: bool


def prepare(
    name: str,
    annotations: Annotations,
    out: PathLike,
    recipe: Recipe,
    make_parts: MakeParts,
    *,
    process: int = 0,
    wait_for_all: Callable[[str], None] = lambda reason: None,
) -> PreparedDataset:
    """Write the data set `out`/NAME/STORAGE/VERSION, unless it is there already. A preparation that was stopped goes on
    where it was.

    Args:
        name: one of DATASETS.
        make_parts: makes the records of a split, in parts: a `PartMaker`.
        process: of several that share the work and the folder, which one; the first writes the data set.
        wait_for_all: returns when all of these have called it.

    Raises:
        UserError: another data set is there, or no clip can be prepared.
    """
    out = as_path(out)
    path = out / name / recipe.image_storage / VERSION
    fingerprint = recipe.fingerprint(annotations.clips)
    work = out / f".{name}-{recipe.image_storage}-{fingerprint}.partial"
    lock = out / f".{name}-{recipe.image_storage}.lock"
    busy = UserError(f"another process prepares this data set: {lock}; wait for it")
    with exclusive_lock(lock, busy) if process == 0 else contextlib.nullcontext():
        if path.exists():
            return _already_there(path, fingerprint)
        if process == 0:
            _remove_leftovers(work, path)
        splits: dict[str, list[Clip]] = {}
        for clip in annotations.clips:
            splits.setdefault(clip.split, []).append(clip)
        parts = {split: make_parts(clips, recipe, work / split) for split, clips in splits.items()}
        wait_for_all("the parts of the data set")
        if process == 0:
            prepared = _join(path, name, splits, parts, recipe, fingerprint)
            work.rmtree()
        wait_for_all("the data set")
        return prepared if process == 0 else _already_there(path, fingerprint)


def _remove_leftovers(work: epath.Path, path: epath.Path) -> None:
    """Remove what other runs left: one of other files or settings, or one that was killed as it wrote the data set."""
    family = work.name.rpartition("-")[0]
    killed = (*path.parent.glob("incomplete.*"), *path.parent.glob(f".{path.name}.*.partial"))
    for half in (*work.parent.glob(f"{family}-*.partial"), *killed):
        if half != work:
            half.rmtree()


def _join(
    path: epath.Path,
    name: str,
    splits: Mapping[str, Sequence[Clip]],
    parts: Mapping[str, Sequence[epath.Path]],
    recipe: Recipe,
    fingerprint: str,
) -> PreparedDataset:
    """Write the data set out of its parts."""
    problems, answers, clip_info = [], {}, []
    for split, clips in splits.items():
        headers = [*map(read_header, parts[split])]
        found = [Problem(kind="not_prepared", line=None, **one) for header in headers for one in header["problems"]]
        aside = {problem.name for problem in found}
        sound = [clip for clip in clips if clip.name not in aside]
        labelled = (asdict(clip) | {"emotion": recipe.label_index(clip.emotion)} for clip in sound)
        problems, answers[split] = [*problems, *found], answers_of(labelled)
        clip_info += [info for header in headers for info in header["clip_info"]]
    metadata = {
        "recipe": asdict(recipe),
        "labels": list(recipe.labels),
        "fingerprint": fingerprint,
        "answers": answers,
        "problems": [json.loads(problem.to_json()) for problem in problems],
        "emollama_jax": __version__,
        "tensorflow_datasets": tfds.__version__,
    }
    if not (counts := write_dataset(path, name, recipe, parts, metadata, clip_info)):
        first = f", the first: {problems[0].message}" if problems else ""
        raise UserError(f"not one of {sum(map(len, splits.values()))} clips could be prepared{first}")
    return PreparedDataset(path, counts, tuple(problems), False)


def write_dataset(
    path: PathLike,
    name: str,
    recipe: Recipe,
    parts: Mapping[str, Sequence[PathLike]],
    metadata: Mapping[str, Any],
    clip_info: Sequence[Mapping[str, Any]] = (),
) -> dict[str, int]:
    """Write a data set, complete or not at all.

    Args:
        parts: the files of each split. A split without records is left out; without any record nothing is written.

    Returns:
        The number of records of each split.

    Raises:
        UserError: the folder cannot be written to.
    """
    counts = {split: count for split, paths in parts.items() if (count := sum(map(count_records, paths)))}
    if not counts:
        return counts
    with atomic_folder(path) as folder:
        identity = tfds.core.dataset_info.DatasetIdentity(
            name=name,
            version=tfds.core.Version(VERSION),
            data_dir=str(folder),
            module_name=__name__,
            config_name=recipe.image_storage,
        )
        info = tfds.core.DatasetInfo(
            builder=identity,
            features=recipe.features(),
            description=DATASETS[name],
            disable_shuffling=True,  # the order of the annotations; training shuffles
            metadata=tfds.core.MetadataDict(metadata),
        )
        info.set_file_format("array_record")
        splits = [_write_split(folder, name, split, parts[split], counts[split]) for split in counts]
        info.set_splits(tfds.core.splits.SplitDict(splits))
        info.write_to_directory(folder)
        if clip_info:
            write_json_lines(folder / CLIP_INFO_FILE, clip_info)
    return counts


def _write_split(folder: Path, name: str, split: str, parts: Sequence[PathLike], count: int) -> tfds.core.SplitInfo:
    """Write the records of a split into files of equal numbers of them."""
    size = sum(as_path(path).stat().length for path in parts)
    num_shards = min(count, max(1, round(size / SHARD_BYTES)))
    ends = [count * (i + 1) // num_shards for i in range(num_shards)]
    lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    files = tfds.core.ShardedFileTemplate(
        dataset_name=name, data_dir=folder, split=split, filetype_suffix="array_record"
    )
    records = (record for path in parts for record in read_records(path))
    written = [
        write_array_record(
            files.sharded_filepath(shard_index=i, num_shards=num_shards), itertools.islice(records, length)
        )
        for i, length in enumerate(lengths)
    ]
    return tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=sum(written), filename_template=files)


def _already_there(path: epath.Path, fingerprint: str) -> PreparedDataset:
    info = tfds.builder_from_directory(str(path)).info
    if info.metadata.get("fingerprint") != fingerprint:
        raise UserError(f"prepared before from other files or settings: {path}; remove it or choose another --out")
    problems = tuple(Problem(**problem) for problem in info.metadata.get("problems", ()))
    return PreparedDataset(path, {name: split.num_examples for name, split in info.splits.items()}, problems, True)

"""The data sets as TFDS builders: clip records in ArrayRecord files, without TensorFlow.

    prepared = prepare(Merr, annotations, Path("data"), Recipe(labels=MERR), workers=8)
    records = Records(prepared.path, "train")

A builder's configuration says how the image is kept: `frame` or `image_tokens`.
"""

import contextlib
import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from emollama_jax import __version__
from emollama_jax.data.annotations import Annotations, Clip
from emollama_jax.data.preparation import (
    Encode,
    Recipe,
    make_record,
    prepare_parts,
    problems_of,
    records_of,
)
from emollama_jax.data.tables import Problem
from emollama_jax.errors import UserError


class ClipBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes the records that were made before, or, with Beam, makes them itself."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name="frame", description="The image as an encoded frame."),
        tfds.core.BuilderConfig(name="image_tokens", description="The image as EVA-ViT's tokens."),
    ]

    def __init__(
        self,
        *,
        recipe: Recipe | None = None,
        parts: dict[str, list[Path]] | None = None,
        clips: Sequence[Clip] = (),
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        self._recipe, self._parts, self._clips, self._metadata = recipe, parts, clips, metadata or {}
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        if self._recipe is None:
            raise UserError(f"{self.name}: nothing to build it from; use emollama prepare, then Records")
        return tfds.core.DatasetInfo(
            builder=self,
            features=self._recipe.features(),
            description=type(self).__doc__,
            disable_shuffling=True,  # the order of the annotations; training shuffles
            metadata=tfds.core.MetadataDict(self._metadata),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        splits = dict.fromkeys(clip.split for clip in self._clips)
        return {split: self._generate_examples(split) for split in splits}

    def _generate_examples(self, split: str):
        if self._parts is not None:
            return enumerate(records_of(self._parts[split], self._recipe))
        import apache_beam as beam

        clips, recipe = [clip for clip in self._clips if clip.split == split], self._recipe
        return beam.Create(list(enumerate(clips))) | beam.Map(lambda item: (item[0], make_record(item[1], recipe)))


class Merr(ClipBuilder):
    """MERR: coarse and fine captions of emotions (Emotion-LLaMA, NeurIPS 2024)."""


class Mer2023(ClipBuilder):
    """MER2023: six emotions, semi-supervised."""


class Mer2024(ClipBuilder):
    """MER2024: six emotions, semi-supervised."""


class Dfew(ClipBuilder):
    """DFEW: seven emotions in film clips."""


class Clips(ClipBuilder):
    """Clips of the user's own."""


BUILDERS = {builder.name: builder for builder in (Merr, Mer2023, Mer2024, Dfew, Clips)}


@dataclass(frozen=True)
class Prepared:
    """A data set on disk: its folder, the clips in each split, the clips put aside, and whether it was there before."""

    path: Path
    counts: dict[str, int]
    problems: tuple[Problem, ...]
    was_there: bool


def prepare(
    builder: type[ClipBuilder],
    annotations: Annotations,
    out: Path,
    recipe: Recipe,
    *,
    workers: int = 1,
    encode: Encode | None = None,
    beam_runner: str | None = None,
) -> Prepared:
    """Writes the data set `out`/NAME/IMAGE/VERSION, unless it is there already. A preparation that was stopped goes
    on where it was.

    Args:
        workers: processes that decode frames.
        encode: from frames to image tokens, for a recipe of these.
        beam_runner: makes the records with Apache Beam instead, on this runner; frames only, and one bad clip is an
            error.

    Raises:
        UserError: another data set is there, or no clip can be prepared.
    """
    clips = annotations.clips
    fingerprint = recipe.fingerprint(clips)
    metadata = {"recipe": asdict(recipe), "labels": list(recipe.labels), "fingerprint": fingerprint}
    metadata |= {"emollama_jax": __version__, "tensorflow_datasets": tfds.__version__}
    common = {"data_dir": str(out), "config": recipe.image, "recipe": recipe, "clips": clips}
    path = out / builder.name / recipe.image / str(builder.VERSION)
    if path.exists():
        return _already_there(path, fingerprint)
    if beam_runner:
        made = builder(**common, metadata=metadata)
        _build(made, tfds.download.DownloadConfig(beam_runner=beam_runner), out)
        return Prepared(path, _counts(made.info), (), False)
    work = out / f".{builder.name}-{recipe.image}-{fingerprint}.partial"
    splits = dict.fromkeys(clip.split for clip in clips)
    parts = {}
    for split in splits:
        chosen = [clip for clip in clips if clip.split == split]
        parts[split] = prepare_parts(chosen, recipe, work / split, workers=workers, encode=encode)
    by_split = {split: problems_of(parts[split]) for split in splits}
    problems = tuple(problem for found in by_split.values() for problem in found)
    if len(problems) == len(clips):
        first = f", the first: {problems[0].message}" if problems else ""
        raise UserError(f"not one of {len(clips)} clips could be prepared{first}")
    empty = [s for s in splits if len(by_split[s]) == sum(clip.split == s for clip in clips)]  # TFDS knows no such
    common["clips"] = [clip for clip in clips if clip.split not in empty]
    metadata |= {"problems": [json.loads(problem.to_json()) for problem in problems]}
    for half in path.parent.glob("incomplete.*"):  # of a process that was killed while TFDS wrote
        shutil.rmtree(half)
    made = builder(**common, parts=parts, metadata=metadata)
    _build(made, None, work)
    shutil.rmtree(work)
    return Prepared(path, _counts(made.info), problems, False)


def _build(builder: ClipBuilder, config: tfds.download.DownloadConfig | None, downloads: Path) -> None:
    """Has TFDS write the files, without its remarks; `downloads` is a folder it makes, though nothing is downloaded."""
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(download_dir=str(downloads / "downloads"), download_config=config)


def _already_there(path: Path, fingerprint: str) -> Prepared:
    info = tfds.builder_from_directory(str(path)).info
    if info.metadata.get("fingerprint") != fingerprint:
        raise UserError(f"prepared before from other files or settings: {path}; remove it or choose another --out")
    problems = tuple(Problem(**problem) for problem in info.metadata.get("problems", ()))
    return Prepared(path, _counts(info), problems, True)


def _counts(info: tfds.core.DatasetInfo) -> dict[str, int]:
    return {name: split.num_examples for name, split in info.splits.items()}

"""The data sets as TFDS builders: clip records in ArrayRecord files, without TensorFlow.

    prepared = prepare(Merr, annotations, Path("data"), Recipe(labels=MERR), Preparation(workers=8))
    records = Records(prepared.path, "train")

A builder's configuration says how the image is kept: `frame` or `image_tokens`.
"""

import contextlib
import fcntl
import importlib.util
import io
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from emollama_jax import __version__
from emollama_jax.data.annotations import Annotations, Clip
from emollama_jax.data.preparation import (
    Recipe,
    clip_info_of,
    make_record,
    problems_of,
    records_of,
)
from emollama_jax.data.records import answers_of
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


FACTS = "clips.jsonl"  # in a data set's folder: what was seen and heard in its clips
MakeParts = Callable[[Sequence[Clip], Recipe, Path], list[Path]]

BUILDERS = {builder.name: builder for builder in (Merr, Mer2023, Mer2024, Dfew, Clips)}


@dataclass(frozen=True)
class PreparedDataset:
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
    make_parts: MakeParts,
    *,
    beam_runner: str | None = None,
    process: int = 0,
    wait_for_all: Callable[[str], None] = lambda reason: None,
) -> PreparedDataset:
    """Writes the data set `out`/NAME/IMAGE/VERSION, unless it is there already. A preparation that was stopped goes
    on where it was.

    Args:
        make_parts: makes the records: those of a split, in parts.
        beam_runner: makes the records with Apache Beam instead, on this runner; frames only, and one bad clip is an
            error.
        process: of several that share the work and the folder, which one; the first writes the data set.
        wait_for_all: returns when all of these have called it.

    Raises:
        UserError: another data set is there, or no clip can be prepared.
    """
    path = out / builder.name / recipe.image / str(builder.VERSION)
    fingerprint = recipe.fingerprint(annotations.clips)
    work = out / f".{builder.name}-{recipe.image}-{fingerprint}.partial"
    with _locked(out / f".{builder.name}-{recipe.image}.lock") if process == 0 else contextlib.nullcontext():
        if path.exists():
            return _already_there(path, fingerprint)
        if beam_runner:
            return _with_beam(builder, annotations.clips, out, recipe, beam_runner)
        if process == 0:
            _remove_leftovers(work, path)
        splits: dict[str, list[Clip]] = {}
        for clip in annotations.clips:
            splits.setdefault(clip.split, []).append(clip)
        parts = {split: make_parts(clips, recipe, work / split) for split, clips in splits.items()}
        wait_for_all("the parts of the data set")
        prepared = _join(builder, splits, parts, out, recipe, fingerprint, work) if process == 0 else None
        wait_for_all("the data set")
        return prepared or _already_there(path, fingerprint)


def _remove_leftovers(work: Path, path: Path) -> None:
    """What other runs left: one of other files or settings, or one that was killed while TFDS wrote."""
    family = work.name.rpartition("-")[0]
    for half in (*work.parent.glob(f"{family}-*.partial"), *path.parent.glob("incomplete.*")):
        if half != work:
            shutil.rmtree(half)


def _join(
    builder: type[ClipBuilder],
    splits: dict[str, list[Clip]],
    parts: dict[str, list[Path]],
    out: Path,
    recipe: Recipe,
    fingerprint: str,
    work: Path,
) -> PreparedDataset:
    """Writes the data set out of its parts."""
    problems, answers, kept = [], {}, []
    for split, clips in splits.items():
        found = problems_of(parts[split])
        aside = {problem.name for problem in found}
        sound = [clip for clip in clips if clip.name not in aside]
        problems, kept, answers[split] = [*problems, *found], [*kept, *sound], _answers(sound, recipe)
    if not kept:
        first = f", the first: {problems[0].message}" if problems else ""
        raise UserError(f"not one of {sum(map(len, splits.values()))} clips could be prepared{first}")
    metadata = _metadata(recipe, fingerprint, answers, problems)
    # TFDS knows no empty splits, and makes those of the clips that it is given.
    made = builder(data_dir=str(out), config=recipe.image, recipe=recipe, clips=kept, parts=parts, metadata=metadata)
    _build(made, None, work)
    if clip_info := [info for split in splits for info in clip_info_of(parts[split])]:
        lines = "".join(f"{json.dumps(info, ensure_ascii=False)}\n" for info in clip_info)
        (Path(made.data_path) / FACTS).write_text(lines, encoding="utf-8")
    shutil.rmtree(work)
    return PreparedDataset(Path(made.data_path), _counts(made.info), tuple(problems), False)


def _with_beam(
    builder: type[ClipBuilder], clips: Sequence[Clip], out: Path, recipe: Recipe, runner: str
) -> PreparedDataset:
    if importlib.util.find_spec("apache_beam") is None:
        raise UserError("--beam: needs Apache Beam; pip install 'emollama_jax[beam]'")
    if recipe.image != "frame":
        raise UserError("--beam: makes frames only; leave it out for image tokens")
    splits = dict.fromkeys(clip.split for clip in clips)
    answers = {split: _answers([clip for clip in clips if clip.split == split], recipe) for split in splits}
    metadata = _metadata(recipe, recipe.fingerprint(clips), answers, ())
    made = builder(data_dir=str(out), config=recipe.image, recipe=recipe, clips=clips, metadata=metadata)
    try:
        _build(made, tfds.download.DownloadConfig(beam_runner=runner), out)
    except Exception as error:  # Beam wraps whatever its workers raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise UserError(f"--beam {runner}: {reason}; mend it, or leave out the clip that it names") from error
    return PreparedDataset(Path(made.data_path), _counts(made.info), (), False)


def _answers(clips: Sequence[Clip], recipe: Recipe) -> dict[str, list[int]]:
    return answers_of(asdict(clip) | {"emotion": recipe.label_index(clip.emotion)} for clip in clips)


def _metadata(
    recipe: Recipe, fingerprint: str, answers: dict[str, dict[str, list[int]]], problems: Sequence[Problem]
) -> dict[str, Any]:
    return {
        "recipe": asdict(recipe),
        "labels": list(recipe.labels),
        "fingerprint": fingerprint,
        "answers": answers,
        "problems": [json.loads(problem.to_json()) for problem in problems],
        "emollama_jax": __version__,
        "tensorflow_datasets": tfds.__version__,
    }


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Raises UserError when another process holds the lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process prepares this data set: {path}; wait for it") from error
        yield


def _build(builder: ClipBuilder, config: tfds.download.DownloadConfig | None, downloads: Path) -> None:
    """Has TFDS write the files, without its remarks; `downloads` is a folder it makes, though nothing is downloaded."""
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(download_dir=str(downloads / "downloads"), download_config=config)


def _already_there(path: Path, fingerprint: str) -> PreparedDataset:
    info = tfds.builder_from_directory(str(path)).info
    if info.metadata.get("fingerprint") != fingerprint:
        raise UserError(f"prepared before from other files or settings: {path}; remove it or choose another --out")
    problems = tuple(Problem(**problem) for problem in info.metadata.get("problems", ()))
    return PreparedDataset(path, _counts(info), problems, True)


def _counts(info: tfds.core.DatasetInfo) -> dict[str, int]:
    return {name: split.num_examples for name, split in info.splits.items()}

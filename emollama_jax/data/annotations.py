"""From the files people have to a list of clips and a list of problems, before any work starts.

`find_annotation_files` finds the files of a data set by their usual names, `read_annotations` reads them. Clips are
joined with subtitles, captions, videos and features by name; a name of digits is the same clip with and without leading
zeros. Names only ever select among the files that a folder lists: they are not made into paths.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emollama_jax.data.annotation_files import AnnotationFiles
from emollama_jax.data.clip_files import FeatureError, FolderFiles, find_below, is_file_name, read_feature
from emollama_jax.data.problems import Problem
from emollama_jax.data.tables import (
    Row,
    key_of,
    read_captions,
    read_rows,
    read_subtitles,
    stem_of,
)
from emollama_jax.errors import UserError
from emollama_jax.io.atomic import write_text
from emollama_jax.io.paths import PathLike
from emollama_jax.media.container import VIDEO_SUFFIXES
from emollama_jax.text.labels import find_label, split_labels
from emollama_jax.text.prompts import FEATURES

THREADS = 16  # they mostly wait for files, often those of another machine
FILES_A_JOB = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """What is known of a clip."""

    name: str
    """As listed, without a video's suffix."""
    split: str
    """Which part of the data set it belongs to, such as train."""
    emotion: str | None = None
    """One of the label set; None where the clip is not labelled."""
    valence: float | None = None
    subtitle: str = ""
    """What the person says."""
    caption_coarse: str = ""
    caption_fine: str = ""
    peak_index: int | None = None
    """The frame in which the expression is strongest."""
    frame_count: int | None = None
    video: Path | None = None
    openface: Path | None = None
    """The CSV file that OpenFace made of the video."""
    features: tuple[Path | None, Path | None, Path | None] = (None, None, None)
    """The files of MAE, VideoMAE and HuBERT, for `read_feature`."""

    @property
    def has_feature(self) -> tuple[bool, bool, bool]:
        """Which of MAE, VideoMAE and HuBERT there are."""
        mae, videomae, hubert = self.features
        return mae is not None, videomae is not None, hubert is not None


@dataclass(frozen=True)
class Annotations:
    """The clips that can be used, and everything that was wrong."""

    clips: tuple[Clip, ...]
    problems: tuple[Problem, ...]

    def summary(self) -> str:
        """A few lines: clips by split, what they have, problems by kind."""

        def counts(counter: Counter[str]) -> str:
            return ", ".join(f"{key} {count:,}" for key, count in counter.items() if count) or "none"

        parts: Counter[str] = Counter()
        for clip in self.clips:
            has = {"label": clip.emotion, "video": clip.video, **dict(zip(FEATURES, clip.features, strict=True))}
            parts["complete"] += None not in has.values()
            has |= {name: getattr(clip, name) or None for name in ("subtitle", "caption_coarse", "caption_fine")}
            parts.update(name for name, value in has.items() if value is not None)
        complete = parts.pop("complete", 0)
        return (
            f"clips: {len(self.clips):,} ({counts(Counter(clip.split for clip in self.clips))})\n"
            f"complete (label, video and all features): {complete:,}\n"
            f"with: {counts(parts)}\n"
            f"problems: {counts(Counter(problem.kind for problem in self.problems))}"
        )

    def write_problems(self, path: PathLike) -> None:
        """One JSON object a line; a file that is there already is replaced."""
        write_text(path, "".join(f"{problem.to_json()}\n" for problem in self.problems))


def read_annotations(files: AnnotationFiles, *, strict: bool = False, check_features: bool = True) -> Annotations:
    """The clips of the lists, in their order, and what is wrong with them.

    A clip that lacks its video, features, subtitle or caption is kept, without them. One with an unsafe name, a name
    that was listed before, an unknown label or a line that cannot be read is put aside.

    Args:
        strict: any problem is an error.
        check_features: read every feature file, and leave out those that `read_feature` does not take.

    Raises:
        UserError: a file or folder that was named is not there or is of no use at all; with `strict`, any problem.
    """
    problems: list[Problem] = []
    reader = _Reader(files, problems)
    clips: list[Clip] = []
    for split, path in files.lists:
        clips += [clip for row in read_rows(path, problems) if (clip := reader.clip(split, path, row))]
    if not files.lists and files.videos:
        rows = [Row(None, {"name": name}) for name, _ in FolderFiles(files.videos, VIDEO_SUFFIXES).named()]
        clips += [clip for row in rows if (clip := reader.clip("clips", files.videos, row))]
    if check_features:
        clips = _without_broken_features(clips, problems)
    if strict and problems:
        raise UserError(f"{len(problems)} problems with the data, the first: {problems[0]}")
    return Annotations(tuple(clips), tuple(problems))


class _Reader:
    """Makes clips of rows, and notes what is wrong with them."""

    def __init__(self, files: AnnotationFiles, problems: list[Problem]):
        self._files = files
        self._problems = problems
        given = {"coarse": files.coarse, "fine": files.fine}
        self._captions = {kind: read_captions(path, problems) for kind, path in given.items() if path}
        self._subtitles = read_subtitles(files.subtitles, problems) if files.subtitles else {}
        self._videos = FolderFiles(files.videos, VIDEO_SUFFIXES)
        self._openface = FolderFiles(files.openface, (".csv",))
        self._features = [FolderFiles(folder, (".npy",)) for folder in files.features]
        self._seen: dict[tuple[str, str], str] = {}

    def clip(self, split: str, path: Path, row: Row) -> Clip | None:
        """The clip, unless its row is put aside."""
        if "video" in row.fields:
            row = Row(row.line, {"name": row.fields["video"].rpartition("/")[2], **row.fields})
        name = row.fields.get("name", "")
        split = row.fields.get("split", split)
        if fault := self._fault(name, split, row.fields):
            self._note(path, row, *fault)
            return None
        self._seen[self._identity(name, split)] = f"{path}:{row.line}"
        key = key_of(name)
        merr: dict[str, Any] = {}
        for captions in self._captions.values():
            merr = {**captions.get(key, {}), **merr}
        subtitle = {"subtitle": self._subtitles[key]} if self._subtitles.get(key) else {}
        fields = {**merr, **subtitle, **row.fields}
        mae, videomae, hubert = (files.select(name) for files in self._features)
        clip = Clip(
            name=stem_of(name),
            split=split,
            emotion=self._label(row.fields.get("emotion")),
            valence=fields.get("valence"),
            subtitle=fields.get("subtitle", ""),
            caption_coarse=fields.get("caption_coarse", ""),
            caption_fine=fields.get("caption_fine", ""),
            peak_index=fields.get("peak_index"),
            frame_count=fields.get("frame_count"),
            video=self._video(path, row),
            openface=self._openface.select(name),
            features=(mae, videomae, hubert),
        )
        for kind, message in self._lacks(clip, row):
            self._note(path, row, kind, message)
        return clip

    def _note(self, path: Path, row: Row, kind: str, message: str) -> None:
        name = row.fields.get("name", "")
        self._problems.append(Problem(kind=kind, name=name, file=str(path), line=row.line, message=message))

    def _fault(self, name: str, split: str, fields: dict[str, Any]) -> tuple[str, str] | None:
        """Why a row is put aside."""
        if not (is_file_name(name) and is_file_name(stem_of(name))):
            return "unsafe_name", f"{name!r} cannot name a clip; give the bare name of a file, without folders"
        video = fields.get("video", "")
        if video and not all(map(is_file_name, video.split("/"))):
            return "unsafe_name", f"the video {video!r} may lie anywhere; give its path below the folder of videos"
        if not re.fullmatch(r"[\w-]+", split) or split.lower() == "all":  # which TFDS keeps for itself
            return "unparsable_line", f"{split!r} cannot name a split; use letters, digits, _ and -, but not all"
        emotion = fields.get("emotion")
        if emotion is not None and self._label(emotion) is None and len(split_labels(emotion)) < 2:
            remedy = "mend it, or choose other labels"
            if emotion.isdecimal():
                remedy = "say from which number on the labels are counted (--label-numbers)"
            return "unknown_label", f"{emotion!r} is none of {', '.join(self._files.labels)}; {remedy}"
        if first := self._seen.get(self._identity(name, split)):
            return "duplicate_name", f"{name!r} is listed already, at {first}; keep one of them"
        return None

    def _lacks(self, clip: Clip, row: Row) -> list[tuple[str, str]]:
        """What a clip that is kept does without."""
        files, name, lacks = self._files, row.fields["name"], []
        if "emotion" in row.fields and clip.emotion is None:
            message = f"{row.fields['emotion']!r} are several labels, and a clip has one; it is kept without"
            lacks.append(("several_labels", message))
        if not clip.video and (files.videos or "video" in row.fields):
            where = files.videos or "the list's folder"
            lacks.append(("missing_video", f"no video {row.fields.get('video', name)!r} in {where}; put it there"))
        for kind, folder, file in zip(FEATURES, files.features, clip.features, strict=True):
            if folder and not file:
                lacks.append(("missing_feature", f"no {kind} feature of {name!r} in {folder}; extract it"))
        if files.subtitles and not clip.subtitle and key_of(name) not in self._subtitles:
            message = f"no subtitle of {name!r} in {files.subtitles}; add a row, an empty one if nothing is said"
            lacks.append(("missing_subtitle", message))
        # A list of coarse or of fine captions needs these, any other list one of those that are given.
        kinds = [clip.split] if clip.split in self._captions else list(self._captions)
        if kinds and not any({"coarse": clip.caption_coarse, "fine": clip.caption_fine}[kind] for kind in kinds):
            lacks.append(("missing_caption", f"no {' or '.join(kinds)} caption of {name!r} in MERR's JSON; add it"))
        return lacks

    def _identity(self, name: str, split: str) -> tuple[str, str]:
        return key_of(name), split if self._files.overlap else ""

    def _label(self, text: str | None) -> str | None:
        if text is None or not self._files.labels:
            return text.lower() if text and len(split_labels(text)) < 2 else None
        return find_label(text, self._files.labels, self._files.first_number)

    def _video(self, path: Path, row: Row) -> Path | None:
        if "video" not in row.fields:
            return self._videos.select(row.fields["name"])
        return find_below(self._files.videos or path.parent, row.fields["video"])


def _without_broken_features(clips: Sequence[Clip], problems: list[Problem]) -> list[Clip]:
    owners = {path: clip.name for clip in reversed(clips) for path in clip.features if path}
    broken = _broken_features(path for clip in clips for path in clip.features if path)
    for path, error in broken.items():
        problem = Problem(kind=error.kind, name=owners[path], file=str(path), line=None, message=error.reason)
        problems.append(problem)

    def mended(clip: Clip) -> Clip:
        mae, videomae, hubert = (None if path in broken else path for path in clip.features)
        return dataclasses.replace(clip, features=(mae, videomae, hubert))

    return [mended(clip) if broken.keys() & set(clip.features) else clip for clip in clips]


def _broken_features(paths: Iterable[Path]) -> dict[Path, FeatureError]:
    """Those of the files that `read_feature` does not take, and why; many files are read at a time."""

    def broken(some: list[Path]) -> dict[Path, FeatureError]:
        errors = {}
        for path in some:
            try:
                read_feature(path)
            except FeatureError as error:
                errors[path] = error
        return errors

    distinct = list(dict.fromkeys(paths))
    jobs = [distinct[start : start + FILES_A_JOB] for start in range(0, len(distinct), FILES_A_JOB)]
    errors: dict[Path, FeatureError] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for found in pool.map(broken, jobs):
            errors |= found
    return errors

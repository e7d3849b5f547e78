"""The files of a data set: lists of clips, captions, subtitles, videos and features, found by their usual names."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emollama_jax.errors import UserError
from emollama_jax.text import labels
from emollama_jax.text.labels import check_labels

# Usual names, in order of preference; transcripts in English go before others.
FEATURE_FOLDERS = tuple(
    (*names, *(f"features/{name}" for name in names))
    for names in (("mae_340_UTT", "mae_*_UTT"), ("maeV_399_UTT", "maeV*_UTT"), ("HL-UTT", "HL*UTT"))
)
VIDEO_FOLDERS = ("video", "videos", "Clip/original", "Clip", "video-labeled")
SUBTITLE_FILES = (
    "transcription_en_all.csv",
    "subtitle_chieng.csv",
    *(f"*{kind}*{language}.csv" for language in ("_en*", "") for kind in ("transcription", "subtitle")),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotationFiles:
    """The files of a data set; what is None is not looked for, what is named must be there."""

    lists: tuple[tuple[str, Path], ...]
    """(split, file): .txt, .csv or .jsonl, see `data/tables.py`; a column `split` of the file goes before this one.
    Without any, every video is a clip of the split `clips`, of which nothing else is known."""
    coarse: Path | None = None
    """MERR's JSON of coarse captions."""
    fine: Path | None = None
    """MERR's JSON of fine captions."""
    subtitles: Path | None = None
    """A CSV of what is said; goes before MERR's `text`, and a list's own column goes before it."""
    videos: Path | None = None
    """The folder of the videos."""
    openface: Path | None = None
    """The folder of OpenFace's {name}.csv, for peak frames that are not listed."""
    features: tuple[Path | None, Path | None, Path | None] = (None, None, None)
    """The folders of {name}.npy of MAE, VideoMAE and HuBERT."""
    labels: tuple[str, ...]
    """The label set; empty takes every label."""
    first_number: int | None = None
    """The number that means the first label in a list, the next one the second; None where a number is no label."""
    overlap: bool = False
    """Whether lists may share clips, as MERR's two do; elsewhere a clip in two lists is a duplicate."""

    def __post_init__(self):
        if self.labels:
            check_labels(self.labels)


def find_annotation_files(name: str, root: str | Path | None = None, **given: Any) -> AnnotationFiles:
    """Find the files of a data set.

    Args:
        name: merr, mer2023, mer2024, mer2025 or dfew; another is for clips of one's own, and nothing is looked for.
        root: the data set's folder.
        given: fields of `AnnotationFiles`, which go before what is found; and `fold`, 1 to 5, of DFEW.

    Raises:
        UserError: no list of clips has one of the usual names.
    """
    fold = given.pop("fold", 1)
    if name in KNOWN:
        files = KNOWN[name](Path(root or "."), fold) if name == "dfew" else KNOWN[name](Path(root or "."))
    else:
        files = AnnotationFiles(lists=(), labels=labels.MERR)
    return dataclasses.replace(files, **given)


def _merr(root: Path) -> AnnotationFiles:
    """The splits coarse and fine, which share clips."""
    coarse, fine = (_find(root, (f"MERR_{kind}_grained.json",)) for kind in ("coarse", "fine"))
    lists = ("MERR_coarse_grained.txt", "MERR_fine_grained.txt")
    return dataclasses.replace(_find_files(root, lists, labels.MERR), coarse=coarse, fine=fine, overlap=True)


def _mer2023(root: Path) -> AnnotationFiles:
    """The split train, and test or test1, test2, test3."""
    lists = ("relative_train_NCEV.txt", "relative_test*_NCEV.txt", "train-label*.csv", "test*-label*.csv")
    return _find_files(root, (*lists, "test-labels/*.csv"), labels.MER2023)


def _mer2024(root: Path) -> AnnotationFiles:
    """The split train, and semi, noise or test."""
    lists = ("relative_train_NCEV.txt", "relative_test*_NCEV.txt", "*semi*_NCE*.txt", "*noise*_NCE*.txt")
    tables = ("label-disdim.csv", "train-label*.csv", "semi-label*.csv", "noise-label*.csv", "test*-label*.csv")
    return _find_files(root, (*lists, *tables, "test-labels/*.csv"), labels.MER2023)


def _mer2025(root: Path) -> AnnotationFiles:
    """The split train, and test."""
    return _find_files(root, ("track1_train_disdim.csv", "track1_test*.csv"), labels.MER2023)


def _dfew(root: Path, fold: int) -> AnnotationFiles:
    """The splits train and test of one of its five folds."""
    tables = [f"EmoLabel_DataSplit/{split}(single-labeled)/set_{fold}.csv" for split in ("train", "test")]
    files = _find_files(root, (*tables, f"rel*tive_DFEW_set_{fold}_*.txt"), labels.DFEW)
    return dataclasses.replace(files, first_number=1)


KNOWN: dict[str, Callable[..., AnnotationFiles]] = {
    "merr": _merr,
    "mer2023": _mer2023,
    "mer2024": _mer2024,
    "mer2025": _mer2025,
    "dfew": _dfew,
}


def _find_files(root: Path, patterns: Sequence[str], labels: tuple[str, ...]) -> AnnotationFiles:
    lists: dict[str, Path] = {}
    for path in (path for pattern in patterns for path in sorted(root.glob(pattern))):
        names = " ".join(reversed(path.relative_to(root).parts))  # the file's own tells more than its folder's
        split = re.search(r"coarse|fine|train|test\d*|semi|noise", names)
        lists.setdefault(split[0] if split else "train", path)  # the first pattern goes before the others
    if not lists:
        raise UserError(f"no list of clips in {root}; it should hold one of {', '.join(patterns)}")
    return AnnotationFiles(
        lists=tuple(lists.items()),
        subtitles=_find(root, SUBTITLE_FILES),
        videos=_find(root, VIDEO_FOLDERS),
        features=feature_folders(root),
        labels=labels,
    )


def feature_folders(root: Path) -> tuple[Path | None, Path | None, Path | None]:
    """Find the folders of the features of MAE, VideoMAE and HuBERT under a folder."""
    mae, videomae, hubert = (_find(root, patterns) for patterns in FEATURE_FOLDERS)
    return mae, videomae, hubert


def _find(root: Path, patterns: Sequence[str]) -> Path | None:
    return next((path for pattern in patterns for path in sorted(root.glob(pattern))), None)

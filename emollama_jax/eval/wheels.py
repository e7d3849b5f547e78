"""Emotion wheels: the groups of like emotions that open-vocabulary labels are compared by.

    wheels = EmotionWheels.load("MERTools/MER2025/MER2025_Track23/emotion_wheel")
    wheels.group("delighted", wheel=1)                            # 'happy'
    wheels.groups(["joyful", "astonished", "neutral"], wheel=1)   # {'happy', 'surprised'}

The tables are those of the MER challenge's scorer, which users name (they do not come with this package):

    format.csv      word forms -> bases, as in "joyfully" -> "joyful"
    synonym.xlsx    bases -> words of the wheels, by eight runs of a language model
    wheelN.xlsx     five wheels: each a tree of three levels; a blank cell repeats the one above it

A label has one or more bases and each base one or more wheel words. Of all these words, in alphabetical order, the
first that stands in the wheel decides: its level-1 or level-2 word is the label's group. A label without one has no
group and is left out. A level-1 word itself belongs at level 2 to the alphabetically first of its level-2 words.
MER2026's scorer reads the same mapping from one file, `wheel_mapping.npz`; give that file in place of the folder.
"""

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emollama_jax.data.table_files import read_bytes
from emollama_jax.errors import UserError, first_line
from emollama_jax.io.npz_files import read_npz
from emollama_jax.io.paths import PathLike, local_path

WHEELS = (1, 2, 3, 4, 5)
LEVELS = (1, 2)
RUNS = 8
MAPPING = "wheel_mapping.npz"

Words = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class EmotionWheels:
    """The tables, ready to map labels to groups.

    Attributes:
        bases: of each word form.
        wheel_words: of each base.
        clusters: by (wheel, level), the group of each wheel word.
        origin: which files these are of: "tables" or "wheel_mapping.npz".
    """

    bases: Words
    wheel_words: Words
    clusters: Mapping[tuple[int, int], Mapping[str, str]]
    origin: str

    @classmethod
    def load(cls, path: PathLike) -> "EmotionWheels":
        """Read the scorer's folder, or its file `wheel_mapping.npz`.

        Raises:
            UserError: a file is missing or is not what it should be.
        """
        path = local_path(str(path))
        if path.suffix == ".npz":
            return _from_mapping(path)
        if not (path / "wheel1.xlsx").is_file() and (path / MAPPING).is_file():
            return _from_mapping(path / MAPPING)
        if missing := [n for n in ("format.csv", "synonym.xlsx", *_wheel_files()) if not (path / n).is_file()]:
            raise UserError(f"no {missing[0]} in {path}; give the folder emotion_wheel of MERTools (MER2025_Track23)")
        clusters = {}
        for wheel, name in zip(WHEELS, _wheel_files(), strict=True):
            tree = _read_wheel(path / name)
            clusters |= {(wheel, level): _cluster(tree, level) for level in LEVELS}
        return cls(_read_forms(path / "format.csv"), _read_synonyms(path / "synonym.xlsx"), clusters, "tables")

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the mapping, in 12 characters, however it was stored."""
        clusters = {f"{wheel}.{level}": dict(words) for (wheel, level), words in self.clusters.items()}
        plain = [{k: sorted(v) for k, v in words.items()} for words in (self.bases, self.wheel_words)]
        return hashlib.sha256(json.dumps([*plain, clusters], sort_keys=True).encode()).hexdigest()[:12]

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """All words of the five wheels, sorted."""
        return tuple(sorted({word for words in self.clusters.values() for word in words}))

    def group(self, label: str, *, wheel: int, level: int = 1) -> str | None:
        """Return the group of a label in a wheel; None where it has none."""
        words = {word for base in self.bases.get(label.lower().strip(), ()) for word in self.wheel_words.get(base, ())}
        cluster = self.clusters[wheel, level]
        return next((cluster[word] for word in sorted(words) if word in cluster), None)

    def groups(self, labels: Iterable[str], *, wheel: int, level: int = 1) -> frozenset[str]:
        """Return the groups of several labels, without those that have none."""
        found = (self.group(label, wheel=wheel, level=level) for label in labels)
        return frozenset(group for group in found if group is not None)


def _wheel_files() -> list[str]:
    return [f"wheel{wheel}.xlsx" for wheel in WHEELS]


def _split(text: str) -> list[str]:
    """Split a cell at commas and quotes."""
    return [item.strip() for item in re.split("['\",]", text.strip("[]")) if item.strip()]


def _add(words: dict[str, list[str]], key: str, value: str) -> None:
    if value not in (values := words.setdefault(key, [])):
        values.append(value)


def _read_forms(path: PathLike) -> Words:
    rows = list(csv.reader(io.StringIO(read_bytes(path).decode("utf-8-sig"))))
    if not rows or [cell.strip() for cell in rows[0][:2]] != ["name", "format"]:
        raise UserError(f"{path} does not begin with the header name,format; give the scorer's own file")
    bases: dict[str, list[str]] = {}
    for row in rows[1:]:
        for form in (*_split(row[1]), row[0]):
            _add(bases, form, row[0])
    return bases


def _read_synonyms(path: PathLike) -> Words:
    header, *rows = _sheet(path)
    words: dict[str, list[str]] = {}
    for run in range(1, RUNS + 1):
        try:
            word, synonyms = header.index(f"word_run{run}"), header.index(f"synonym_run{run}")
        except ValueError as error:
            raise UserError(f"{path} has no columns of run {run} ({error}); give the scorer's own file") from error
        for row in rows:
            if row[word]:
                for synonym in (*_split(row[synonyms]), row[word]):
                    _add(words, synonym.lower(), row[word].lower())
    return words


Tree = dict[str, dict[str, list[str]]]


def _read_wheel(path: PathLike) -> Tree:
    header, *rows = _sheet(path)
    if header[:3] != ["level1", "level2", "level3"]:
        raise UserError(f"{path} has not the columns level1, level2, level3; give the scorer's own file")
    tree: Tree = {}
    above = ["", "", ""]
    for row in rows:
        above = [cell.lower() or last for cell, last in zip(row[:3], above, strict=True)]
        tree.setdefault(above[0], {}).setdefault(above[1], []).append(above[2])
    return tree


def _cluster(tree: Tree, level: int) -> dict[str, str]:
    """Map each word of a wheel to its word of this level; of a word in several places the last counts."""
    cluster = {}
    for first, below in tree.items():
        cluster[first] = first if level == 1 else min(below)
        for second, thirds in below.items():
            cluster |= dict.fromkeys([second, *thirds], first if level == 1 else second)
    return cluster


def _sheet(path: PathLike) -> list[list[str]]:
    """Read the rows of an Excel file's first sheet that are not empty, stripped; an empty cell is ""."""
    try:
        import openpyxl
    except ImportError as error:
        raise UserError(f"wheels are Excel files: {path}; pip install 'emollama_jax[xlsx]'") from error
    try:
        sheet = openpyxl.load_workbook(io.BytesIO(read_bytes(path)), read_only=True, data_only=True).worksheets[0]
        rows = [
            ["" if cell is None else str(cell).strip() for cell in row] for row in sheet.iter_rows(values_only=True)
        ]
    except Exception as error:  # openpyxl has no common class for what damaged files raise
        if isinstance(error, UserError):
            raise
        raise UserError(f"not an Excel file, or damaged: {path} ({first_line(error)}); copy it again") from error
    if not (rows := [row for row in rows if any(row)]):
        raise UserError(f"empty: {path}; give the scorer's own file")
    return rows


def _from_mapping(path: PathLike) -> EmotionWheels:
    found: dict[str, Any] = read_npz(path)
    try:
        trees = found["wheel_map_whole"]
        clusters = {
            (wheel, level): dict(trees[f"wheel{wheel}"][f"level{level}"]) for wheel in WHEELS for level in LEVELS
        }
        return EmotionWheels(dict(found["format_mapping"]), dict(found["raw_mapping"]), clusters, MAPPING)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"not the scorer's mapping: {path} ({first_line(error)}); give {MAPPING}") from error

"""The text files that describe clips, read as rows of named fields: lists, tables, transcripts, MERR's captions.

    .txt     name emotion | name frames emotion [valence], separated by white space
    .csv     a header, then one clip a row; COLUMNS says which headers are known
    .jsonl   one object a line, with the same fields
    .json    MERR: one object, clip name -> object

A line that cannot be read is noted as a `Problem` and left out; what makes a whole file useless is a `UserError`.
"""

import csv
import dataclasses
import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from emollama_jax.errors import UserError
from emollama_jax.text.labels import DFEW

VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".mov", ".webm")

# Field -> the headers it goes by; where a file has several of them, the first that is filled.
COLUMNS = {
    "name": ("name", "names", "video_name"),
    "emotion": ("emotion", "discrete", "label"),
    "valence": ("valence",),
    "frame_count": ("frame_count", "frames"),
    "peak_index": ("peak_index",),
    "subtitle": ("subtitle", "sentence_en", "english", "sentence", "text"),
    "caption_coarse": ("caption_coarse", "caption"),
    "caption_fine": ("caption_fine", "smp_reason_caption", "eng_reasons", "chi_reasons"),
    "video": ("video",),
    "split": ("split",),
    "question": ("question",),
    "answer": ("answer", "prediction", "response"),
}
# DFEW's tables are told by their column video_name.
DFEW_LABELS = {str(number): label for number, label in enumerate(DFEW, 1)}


# The kinds of problem for which a clip is left out of the data set.
PUT_ASIDE = ("unsafe_name", "duplicate_name", "unknown_label", "unparsable_line", "not_prepared")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something wrong with the files of a data set."""

    kind: str
    """unsafe_name, duplicate_name, unknown_label or unparsable_line (the line is put aside); duplicate_key,
    missing_video, missing_feature, missing_subtitle or missing_caption (the clip does without, or the first holds);
    wrong_shape, not_finite, object_dtype or unreadable_feature (the feature is left out); not_prepared (its files did
    not make a record)."""
    name: str | None
    """The clip, as it is written in the file."""
    file: str
    """Where to look."""
    line: int | None
    """Counted from 1; None in files that have no lines to speak of (.npy, .json)."""
    message: str
    """What is wrong, and the remedy."""

    def __str__(self) -> str:
        return f"{self.file}{f':{self.line}' if self.line else ''}: {self.message}"

    def to_json(self) -> str:
        """One line of JSON; bytes that are not UTF-8 appear as escapes."""
        text = json.dumps(dataclasses.asdict(self), ensure_ascii=False)
        return text.encode("utf-8", "backslashreplace").decode("utf-8")


class Row(NamedTuple):
    """What one line says of a clip: the fields of COLUMNS that are filled, texts stripped and numbers read."""

    line: int | None
    fields: dict[str, Any]


def stem_of(name: str) -> str:
    """A clip's name without the suffix of a video, should it have one."""
    stem, dot, suffix = name.rpartition(".")
    return stem if stem and dot + suffix.lower() in VIDEO_SUFFIXES else name


def key_of(name: str) -> str:
    """What names of the same clip have in common: "7", "00007" and "00007.mp4" are one."""
    stem = stem_of(name)
    return (stem.lstrip("0") or "0") if stem.isascii() and stem.isdigit() else stem


def read_rows(path: Path, problems: list[Problem], needs: Iterable[str] = ("name",)) -> list[Row]:
    """The rows of a list or table, whose format its suffix tells.

    Args:
        needs: the fields that a CSV must have a column for.

    Raises:
        UserError: the file cannot be opened, or it is a CSV without a column that is needed.
    """
    note = _Notes(path, problems)
    text = _text(path)
    if path.suffix.lower() == ".csv":
        records = _csv_records(text, note, needs)
    else:
        records = (_jsonl_records if path.suffix.lower() == ".jsonl" else _list_records)(text, note)
    rows = []
    for line, record in records:
        if (fields := _fields(record, note, line)) is not None:
            rows.append(Row(line, fields))
    return rows


def read_subtitles(path: Path, problems: list[Problem]) -> dict[str, str]:
    """What is said in each clip, by `key_of` its name: the English column where there is one.

    Raises:
        UserError: as in `read_rows`.
    """
    note = _Notes(path, problems)
    subtitles: dict[str, str] = {}
    for line, fields in read_rows(path, problems, ("name", "subtitle")):
        name = fields.get("name", "")
        if key_of(name) in subtitles:
            note("duplicate_key", name, line, f"{name!r} has a subtitle already; the first is used, keep one of them")
        subtitles.setdefault(key_of(name), fields.get("subtitle", ""))
    return subtitles


def read_captions(path: Path, problems: list[Problem]) -> dict[str, dict[str, Any]]:
    """The fields of MERR's JSON, by `key_of` the clip's name. Of keys that occur twice the first counts.

    Raises:
        UserError: the file cannot be opened, or it is not one JSON object.
    """
    note = _Notes(path, problems)
    try:
        clips = json.loads(_text(path), object_pairs_hook=_Object)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON, or cut short: {path} ({error}); download or copy it again") from error
    if not isinstance(clips, _Object):
        raise UserError(f"{path} is not a JSON object keyed by clip names; give MERR's own file")
    for name in clips.repeated:
        note("duplicate_key", name, None, f"{name!r} occurs more than once; the first is used, keep one of them")
    captions: dict[str, dict[str, Any]] = {}
    for name, clip in clips.items():
        fields = _fields(clip, note, None, name)
        if fields is not None:
            captions.setdefault(key_of(name), fields)
    return captions


class _Object(dict):
    """A JSON object in which the first of equal keys stays, and `repeated` names them."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__()
        for key, value in pairs:
            self.setdefault(key, value)
        counts = Counter(key for key, _ in pairs) if len(pairs) > len(self) else {}
        self.repeated = [key for key, count in counts.items() if count > 1]


class _Notes:
    """Writes down the problems of one file."""

    def __init__(self, path: Path, problems: list[Problem]):
        self.path = path
        self._problems = problems

    def __call__(self, kind: str, name: str | None, line: int | None, message: str) -> None:
        problem = Problem(kind=kind, name=name, file=str(self.path), line=line, message=message)
        self._problems.append(problem)


def _text(path: Path) -> str:
    # Bytes that are not UTF-8 become surrogates: they cost their line (in `_fields`), not the file.
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            return file.read()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); check the path") from error


def _lines(text: str) -> Iterator[tuple[int, str]]:
    # Not splitlines: it would also cut at the rarer separators inside of a caption.
    for number, line in enumerate(re.split("\r\n|\n|\r", text), 1):
        if line.strip():
            yield number, line


def _list_records(text: str, note: _Notes) -> Iterator[tuple[int, Any]]:
    layouts = {2: ("name", "emotion"), 3: ("name", "frames", "emotion"), 4: ("name", "frames", "emotion", "valence")}
    for number, line in _lines(text):
        words = line.split()
        if len(words) in layouts:
            yield number, dict(zip(layouts[len(words)], words, strict=True))
        else:
            wanted = "write 'name emotion' or 'name frames emotion [valence]', names without spaces"
            note("unparsable_line", words[0], number, f"{len(words)} words; {wanted}")


def _jsonl_records(text: str, note: _Notes) -> Iterator[tuple[int, Any]]:
    for number, line in _lines(text):
        try:
            record = json.loads(line, object_pairs_hook=_Object)
        except (ValueError, RecursionError) as error:
            note("unparsable_line", None, number, f"not JSON ({error}); mend or remove the line")
            continue
        yield number, record


def _csv_records(text: str, note: _Notes, needs: Iterable[str]) -> Iterator[tuple[int, Any]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    while True:
        start, cells, fault = reader.line_num + 1, [], ""
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            fault = str(error)
        if not any(cell.strip() for cell in cells) and not fault:
            continue
        if not header:
            header = [cell.strip().lower() for cell in cells]
            _check_header(header, note.path, needs)
            continue
        if not fault and len(cells) != len(header):
            fault = f"{len(cells)} fields where the header has {len(header)}"
        record = dict(zip(header, cells, strict=False))
        if not fault:
            yield start, record
            continue
        span = f" in lines {start} to {reader.line_num}" if reader.line_num > start else ""
        remedy = "put texts with commas or quotes in quotes, and double the quotes in them"
        note("unparsable_line", _filled(record, "name"), start, f"{fault}{span}; {remedy}")
    if not header:
        raise UserError(f"{note.path} is empty; begin with a header line such as name,emotion")


def _check_header(header: list[str], path: Path, needs: Iterable[str]) -> None:
    for field in needs:
        if not set(COLUMNS[field]) & set(header):
            wanted = " or ".join(COLUMNS[field])
            found = ascii(", ".join(header)[:100])
            raise UserError(f"{path} has no column {wanted}, its first line is {found}; begin with a header line")


def _fields(record: Any, note: _Notes, line: int | None, name: str | None = None) -> dict[str, Any] | None:
    """The fields of a record, or None, and a note, where it cannot be used."""
    fields: dict[str, Any] = {}
    try:
        if not isinstance(record, dict):
            raise ValueError("not an object of fields")
        known = {key.strip().lower(): value for key, value in record.items()}
        name = name or _filled(known, "name")
        for field in COLUMNS:
            if text := _filled(known, field):
                fields[field] = NUMBERS[field](field, text) if field in NUMBERS else text
                text.encode()
        (name or "").encode()
    except UnicodeEncodeError:
        return note("unparsable_line", name, line, "holds what is not UTF-8; save the file as UTF-8")
    except ValueError as error:
        return note("unparsable_line", name, line, f"{error}; mend or remove it")
    for key in getattr(record, "repeated", ()):
        note("duplicate_key", name, line, f"the key {key!r} occurs more than once; the first is used, keep one of them")
    if "video_name" in known and fields.get("emotion") in DFEW_LABELS:
        fields["emotion"] = DFEW_LABELS[fields["emotion"]]
    return fields


def _filled(record: dict[str, Any], field: str) -> str | None:
    """The first of the field's columns that holds something."""
    for column in COLUMNS[field]:
        value = record.get(column)
        if isinstance(value, bool | list | dict):
            raise ValueError(f"{column} is neither a text nor a number")
        if value is not None and str(value).strip():
            return str(value).strip()
    return None


def _number(field: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{field} {text!r} is not a number")
    return value


def _whole(field: str, text: str) -> int:
    # Tables that went through a spreadsheet or pandas have 12.0 for 12.
    if not re.fullmatch(r"\d+(\.0*)?", text, re.ASCII):
        raise ValueError(f"{field} {text!r} is not a whole number")
    return int(text.partition(".")[0])


NUMBERS = {"valence": _number, "frame_count": _whole, "peak_index": _whole}

"""Lists, tables, transcripts and MERR's captions as rows of named fields: one set of rules for every file and verb.

COLUMNS says which headers and keys are known, others are named in a warning. A header occurs once, and of equal keys of
JSON the first counts. What says that a value is missing (MISSING: nan, N/A, null, ...) is as an empty cell. A line that
cannot be read is noted as a `Problem` and left out; what makes a whole file useless is a `UserError`.
"""

import json
import math
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

from emollama_jax.data.problems import FileProblems, Problem
from emollama_jax.data.table_files import JsonObject, as_text, read_bytes, read_records
from emollama_jax.errors import UserError
from emollama_jax.io.text_encoding import decode_text
from emollama_jax.media.container import VIDEO_SUFFIXES

# Field -> the headers it goes by; where a file has several of them, the first that is filled.
COLUMNS = {
    "name": ("name", "names", "video_name"),
    "emotion": ("emotion", "emotions", "discrete", "label", "openset"),
    "valence": ("valence",),
    "frame_count": ("frame_count", "frames"),
    "peak_index": ("peak_index",),
    "subtitle": (
        *("subtitle", "subtitles", "sentence_en", "english", "sentence"),
        *("text", "utterance", "chinese"),
    ),
    "caption_coarse": ("caption_coarse", "caption"),
    "caption_fine": ("caption_fine", "smp_reason_caption", "eng_reasons", "reasons", "chi_reasons"),
    "video": ("video",),
    "split": ("split",),
    "question": ("question",),
    "answer": ("answer", "prediction", "response"),
}
MELD = {"dialogue_id", "utterance_id"}  # which name a clip together, as in dia3_utt11.mp4
LISTS = ("emotion", "answer")  # fields that may be a list of labels
# Of the records that `emollama predict` writes.
PREDICTED = {"record", "status", "stage", "error", "answers", "probabilities", "clip", "fingerprint", "timings_s"}
HEADERS = frozenset(column for columns in COLUMNS.values() for column in columns)
MISSING = {"", *"nan NaN NAN -nan -NaN NaT NA <NA> N/A n/a #N/A #NA null NULL None".split()}
MISSING |= {"#NULL!", "#VALUE!", "#REF!", "#DIV/0!", "#NUM!", "#NAME?"}  # what Excel writes for errors


class Row(NamedTuple):
    """What one line says of a clip: the fields of COLUMNS that are filled, texts stripped and numbers read."""

    line: int | None
    fields: dict[str, Any]


def stem_of(name: str) -> str:
    """A clip's name without the suffix of a video, should it have one."""
    stem, dot, suffix = name.rpartition(".")
    return stem if stem and dot + suffix.lower() in VIDEO_SUFFIXES else name


def key_of(name: str) -> str:
    """What names of the same clip have in common: "7", "00007" and "00007.mp4" are one, and so are composed and
    decomposed letters, which systems of files write differently."""
    stem = unicodedata.normalize("NFC", stem_of(name))
    return (stem.lstrip("0") or "0") if stem.isascii() and stem.isdigit() else stem


def read_rows(
    path: Path,
    problems: list[Problem],
    needs: Iterable[str | tuple[str, ...]] = (("name", "video"),),
    *,
    unparsable: str = "unparsable_line",
) -> list[Row]:
    """The rows of a list or table, in any format of `table_files`.

    Args:
        needs: the fields that a table must have a column for, or a record a key; of several in a tuple, any.
        unparsable: the kind of problem that a line is which cannot be read.

    Raises:
        UserError: the file cannot be opened, a header occurs twice, or there is no column that is needed.
    """
    note = FileProblems(path, problems, unparsable)
    columns, records = read_records(note, HEADERS, VIDEO_SUFFIXES)
    rows, is_table = [], bool(columns)
    for line, record in records:
        if isinstance(record, dict):
            columns |= {str(key).strip().lower() for key in record} if not is_table else set()
            if (fields := _fields(record, note, line)) is not None:
                rows.append(Row(line, fields))
        else:
            note.add_unparsable(None, line, "not an object of fields; mend or remove it")
    if is_table or rows:
        _check_columns(columns, path, needs)
    if unread := sorted(c for c in columns - HEADERS - PREDICTED - MELD if c and not c.startswith("unnamed: ")):
        logging.warning("%s: nothing reads the columns %s", path, ", ".join(unread[:10]))
    return rows


def _check_columns(columns: set[str], path: Path, needs: Iterable[str | tuple[str, ...]]) -> None:
    columns = columns | {"name"} if MELD <= columns else columns
    for need in needs:
        wanted = [column for field in ((need,) if isinstance(need, str) else need) for column in COLUMNS[field]]
        if not columns & set(wanted):
            found = ascii(", ".join(sorted(columns))[:100])
            raise UserError(f"{path} has no column {' or '.join(wanted)}, it has {found}; give one of them")


def read_subtitles(path: Path, problems: list[Problem]) -> dict[str, str]:
    """What is said in each clip, by `key_of` its name: the English column where there is one.

    Raises:
        UserError: as in `read_rows`.
    """
    note = FileProblems(path, problems, "unparsable_subtitle")
    subtitles: dict[str, str] = {}
    for line, fields in read_rows(path, problems, ("name", "subtitle"), unparsable=note.unparsable):
        if not (name := fields.get("name", "")):
            note.add_unparsable(None, line, "no name; give one, or remove the line")
        elif key_of(name) in subtitles:
            message = f"{name!r} has a subtitle already; the first is used, keep one of them"
            note.add("duplicate_key", name, line, message)
        else:
            subtitles[key_of(name)] = fields.get("subtitle", "")
    return subtitles


def read_captions(path: Path, problems: list[Problem]) -> dict[str, dict[str, Any]]:
    """The fields of MERR's JSON, by `key_of` the clip's name. Of keys that occur twice the first counts.

    Raises:
        UserError: the file cannot be opened, or it is not one JSON object.
    """
    note = FileProblems(path, problems, "unparsable_caption")
    try:
        clips = json.loads(decode_text(read_bytes(path), "surrogateescape"), object_pairs_hook=JsonObject)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON, or cut short: {path} ({error}); download or copy it again") from error
    if not isinstance(clips, JsonObject):
        raise UserError(f"{path} is not a JSON object keyed by clip names; give MERR's own file")
    captions: dict[str, dict[str, Any]] = {}
    for name in clips.repeated:
        note.add("duplicate_key", name, None, f"{name!r} occurs more than once; the first is used, keep one of them")
    for name, clip in clips.items():
        if not isinstance(clip, dict):
            note.add_unparsable(name, None, "not an object of fields; mend or remove it")
        elif (fields := _fields(clip, note, None, name)) is None:
            continue
        elif key_of(name) in captions:
            note.add("duplicate_key", name, None, f"{name!r} is a clip above; the first is used, keep one of them")
        else:
            captions[key_of(name)] = fields
    _count_peaks_from_0(clips, captions, note)
    return captions


def _count_peaks_from_0(clips: JsonObject, captions: dict[str, dict[str, Any]], note: FileProblems) -> None:
    """Takes 1 off the peaks of a file that MER-Factory exported: they are texts there, and count from 1."""
    given = [clip["peak_index"] for clip in clips.values() if isinstance(clip, dict) and "peak_index" in clip]
    peaks = [fields["peak_index"] for fields in captions.values() if "peak_index" in fields]
    if not peaks or 0 in peaks or not all(isinstance(peak, str) for peak in given):
        return
    for fields in captions.values():
        if "peak_index" in fields:
            fields["peak_index"] -= 1
    message = "peak_index is a text, as MER-Factory writes it, and counts from 1: 1 is taken off; write numbers from 0"
    note.add("counted_from_1", None, None, message)


def _fields(
    record: dict[str, Any], note: FileProblems, line: int | None, name: str | None = None
) -> dict[str, Any] | None:
    """The fields of a record, or None, and a note, where it cannot be used."""
    known: dict[str, Any] = {}
    repeated = list(getattr(record, "repeated", ()))
    for key, value in record.items():
        column = str(key).strip().lower()
        if column in known:
            repeated.append(key)
        known.setdefault(column, value)
    if MELD <= known.keys():
        known.setdefault("name", f"dia{as_text(known['dialogue_id'])}_utt{as_text(known['utterance_id'])}")
    fields: dict[str, Any] = {}
    try:
        name = name or _filled(known, "name")
        for field in COLUMNS:
            if text := _filled(known, field):
                text.encode()
                number = NUMBERS[field](field, text) if field in NUMBERS else text
                if number is not None:
                    fields[field] = number
        (name or "").encode()
    except UnicodeEncodeError:
        return note.add_unparsable(name, line, "holds what is not UTF-8; save the file as UTF-8")
    except ValueError as error:
        return note.add_unparsable(name, line, f"{error}; mend or remove it")
    for key in repeated:
        message = f"the key {key!r} occurs more than once; the first is used, keep one of them"
        note.add("duplicate_key", name, line, message)
    return fields


def _filled(record: dict[str, Any], field: str) -> str | None:
    """The first of the field's columns that holds something."""
    found: dict[str, str] = {}
    for column in COLUMNS[field]:
        value = record.get(column)
        if isinstance(value, list) and field in LISTS:
            value = f"[{', '.join(map(as_text, value))}]"
        if isinstance(value, bool | list | dict):
            raise ValueError(f"{column} is neither a text nor a number")
        if (text := as_text(value)) not in MISSING:
            found[column] = text
    if field in SINGLE and len({SINGLE[field](text) for text in found.values()} - {""}) > 1:
        said = " and ".join(f"{column} says {text!r}" for column, text in found.items())
        raise ValueError(f"{said}; keep one column")
    return next(iter(found.values()), None)


def _number(field: str, text: str) -> float:
    try:
        value = float(text.replace(",", ".") if text.count(",") == 1 else text)
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


# Fields of which columns must agree, and by what: numbers beside labels in words are left alone.
SINGLE = {"name": key_of, "emotion": lambda text: "" if text.isdecimal() else text.casefold(), "answer": str.casefold}
NUMBERS = {"valence": _number, "frame_count": _whole, "peak_index": _whole}

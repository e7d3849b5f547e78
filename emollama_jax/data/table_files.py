"""Lists and tables in the formats that people have, read as records: header or key -> value.

    .csv .tsv     a header, then one clip a row; cells parted by commas, semicolons or tabs, as the header is
    .xlsx         the same, of the one sheet that is filled
    .jsonl .json  one object a line, or an array of objects
    .txt          name emotion | name frames emotion [valence], separated by white space; or one video a line; or a
                  table as above, where its first line is a header

What a file holds goes before its suffix. Text is decoded by `io.text_encoding`.
"""

import csv
import io
import json
import re
import zipfile
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from emollama_jax.data.problems import FileProblems
from emollama_jax.errors import UserError, first_line
from emollama_jax.io.text_encoding import decode_text

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".xlsx", ".txt")  # by which a file is told to be a list, not a video
DELIMITERS = (",", ";", "\t")
LAYOUTS = {2: ("name", "emotion"), 3: ("name", "frames", "emotion"), 4: ("name", "frames", "emotion", "valence")}

Records = Iterator[tuple[int, Any]]  # (line or place in an array, from 1; what it says: a dict, unless it is damaged)


class JsonObject(dict):
    """A JSON object in which the first of equal keys stays, and `repeated` names them."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__()
        for key, value in pairs:
            self.setdefault(key, value)
        counts = Counter(key for key, _ in pairs) if len(pairs) > len(self) else {}
        self.repeated = [key for key, count in counts.items() if count > 1]


def read_records(problems: FileProblems, headers: Collection[str], videos: Collection[str]) -> tuple[set[str], Records]:
    """Read a list or table.

    Args:
        problems: of the file, which get the lines that cannot be read.
        headers: those that are known, in lower case.
        videos: the suffixes of videos, by which a line of a .txt is told to be one.

    Returns:
        The columns of a table, in lower case (of other formats none), and the records.

    Raises:
        UserError: the file cannot be opened or is of no format above, or a header that is known occurs twice.
    """
    path = problems.path
    data = read_bytes(path)
    if data.startswith(b"PK\x03\x04"):
        return _table(_sheet_rows(path, data), problems, headers)
    if data.startswith(b"\xd0\xcf\x11\xe0"):
        raise UserError(f"an Excel file of before 2007: {path}; save it as .xlsx or CSV")
    text = decode_text(data, "surrogateescape")
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".json"):
        return set(), _json_array(text, path) if re.match(r"\s*\[\s*\{", text) else _json_lines(text, problems)
    if suffix in (".csv", ".tsv") or _is_header(text, headers):
        return _table(_csv_rows(text, headers), problems, headers)
    return set(), _list_lines(text, problems, videos)


def read_bytes(path: Path) -> bytes:
    """Return what a file holds. Raises UserError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); check the path") from error


Rows = Iterator[tuple[int, list[str], str]]  # (line; cells; why the row cannot be read, if so)


def _table(rows: Rows, problems: FileProblems, headers: Collection[str]) -> tuple[set[str], Records]:
    """Read the header, and return the columns and the records below it."""
    _, cells, fault = next(rows, (1, [], ""))
    if fault:
        raise UserError(f"{problems.path}: the header cannot be read ({fault}); mend it")
    if not cells:
        raise UserError(f"{problems.path} is empty; begin with a header line such as name,emotion")
    header = [cell.strip().lower() for cell in cells]
    if repeated := [column for column in header if column in headers and header.count(column) > 1]:
        raise UserError(f"{problems.path}: the column {repeated[0]} is there twice; keep one of them, or rename one")
    return set(header), _records(rows, header, problems)


def _records(rows: Rows, header: list[str], problems: FileProblems) -> Records:
    for line, cells, fault in rows:
        if not fault and len(cells) != len(header):
            fault = f"{len(cells)} fields where the header has {len(header)}"
        record = dict(zip(header, cells, strict=False))
        if fault:
            remedy = "put texts with commas or quotes in quotes, and double the quotes in them"
            problems.add_unparsable(record.get("name"), line, f"{fault}; {remedy}")
        else:
            yield line, record


def _csv_rows(text: str, headers: Collection[str]) -> Rows:
    """The rows that are not empty."""
    skipped, delimiter = 0, None
    if told := re.match(r"sep=(.)(\r\n|\n|\r)", text):  # Excel's own way to say so
        skipped, delimiter, text = 1, told[1], text[told.end() :]
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter or _delimiter(text, headers))
    while True:
        start, cells, fault = reader.line_num + 1, [], ""
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            span = f" in lines {start} to {reader.line_num}" if reader.line_num > start else ""
            fault = f"{error}{span}"
        if fault or any(cell.strip() for cell in cells):
            yield start + skipped, cells, fault


def _first_line(text: str) -> str:
    found = re.search(r"[^\r\n]*\S[^\r\n]*", text)
    return found[0] if found else ""


def _headers_by(delimiter: str, text: str, headers: Collection[str]) -> int:
    """How many known headers the first line has when it is split so."""
    return len({cell.strip(' "').lower() for cell in _first_line(text).split(delimiter)} & set(headers))


def _delimiter(text: str, headers: Collection[str]) -> str:
    """That which gives the most known headers, or else the most cells."""
    line = _first_line(text)
    return max(DELIMITERS, key=lambda delimiter: (_headers_by(delimiter, text, headers), line.count(delimiter)))


def _is_header(text: str, headers: Collection[str]) -> bool:
    return any(_headers_by(delimiter, text, headers) > 1 for delimiter in DELIMITERS)


def _sheet_rows(path: Path, data: bytes) -> Rows:
    """The rows of the one sheet that is filled."""
    try:
        import openpyxl
    except ImportError as error:
        raise UserError(
            f"an Excel file needs openpyxl: {path}; pip install 'emollama_jax[xlsx]', or save it as CSV"
        ) from error
    try:
        book = openpyxl.load_workbook(io.BytesIO(data), read_only=True, data_only=True)
        sheets = {sheet.title: list(sheet.iter_rows(values_only=True)) for sheet in book.worksheets}
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError, SyntaxError, OSError) as error:
        raise UserError(f"not an Excel file, or damaged: {path} ({first_line(error)}); save it again") from error
    filled = {title: rows for title, rows in sheets.items() if any(cell is not None for row in rows for cell in row)}
    if len(filled) > 1:
        raise UserError(f"{path} has several sheets: {', '.join(filled)}; keep one, or save it as CSV")
    for line, row in enumerate(next(iter(filled.values()), []), 1):
        cells = [as_text(cell) for cell in row]
        if any(cells):
            yield line, cells, ""


def as_text(value: Any) -> str:
    """Return the text of a cell or of a JSON value; of whole numbers without a decimal point."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None else str(value).strip()


def _json_array(text: str, path: Path) -> Records:
    try:
        records = json.loads(text, object_pairs_hook=JsonObject)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON, or cut short: {path} ({error}); mend it, or write one object a line") from error
    return iter(enumerate(records, 1))


def _json_lines(text: str, problems: FileProblems) -> Records:
    for number, line in _lines(text):
        try:
            record = json.loads(line, object_pairs_hook=JsonObject)
        except (ValueError, RecursionError) as error:
            problems.add_unparsable(None, number, f"not JSON ({error}); mend or remove the line")
            continue
        yield number, record


def _list_lines(text: str, problems: FileProblems, videos: Collection[str]) -> Records:
    lines = list(_lines(text))
    only_names = all(len(line.split()) == 1 for _, line in lines)
    for number, line in lines:
        words = line.split()
        if only_names or line.strip().lower().endswith(tuple(videos)):
            yield number, {"video" if "/" in line else "name": line.strip()}
        elif len(words) in LAYOUTS:
            yield number, dict(zip(LAYOUTS[len(words)], words, strict=True))
        else:
            wanted = "write 'name emotion' or 'name frames emotion [valence]', names without spaces"
            problems.add_unparsable(words[0], number, f"{len(words)} words; {wanted}")


def _lines(text: str) -> Iterator[tuple[int, str]]:
    # Not splitlines: it would also cut at the rarer separators inside of a caption.
    for number, line in enumerate(re.split("\r\n|\n|\r", text), 1):
        if line.strip():
            yield number, line

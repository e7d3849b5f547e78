"""Files of JSON objects, one a line (.jsonl)."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from emollama_jax.io.atomic import write_bytes
from emollama_jax.io.paths import PathLike, as_path, is_remote

Record = dict[str, Any]


def read_json_lines(path: PathLike) -> list[Record]:
    """Reads the objects of a file in their order. A last line that was cut short is left out.

    Raises:
        ValueError: a line is no JSON object; the message says which ("line 3 is damaged").
    """
    records = []
    for number, (_, record) in enumerate(_lines(as_path(path).read_bytes()), 1):
        if record is None:
            raise ValueError(f"line {number} is damaged")
        records.append(record)
    return records


def write_json_lines(path: PathLike, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes a file of these objects, in place of one that is there."""
    write_bytes(path, _encoded(records))


class JsonLinesFile:
    """A file that objects are appended to and that survives a kill at any moment.

    An object store has no appending: there the lines are kept in memory too, and every durable write puts the whole.

    Attributes:
        path: the file.
    """

    def __init__(self, path: PathLike, keep: Callable[[Record], bool] = lambda record: True):
        """Opens a file, which need not exist. Of the lines in it those stay that `keep` accepts; a line that is no JSON
        object, as one cut short by a kill, is dropped."""
        self.path = as_path(path)
        data = self.path.read_bytes() if self.path.exists() else b""
        lines = [line for line, record in _lines(data) if record is not None and keep(record)]
        if b"".join(lines) != data:
            write_bytes(path, b"".join(lines))
        self._lines = lines if is_remote(path) else []

    def append(self, records: Iterable[Mapping[str, Any]], *, durable: bool = True) -> None:
        """Appends objects. When it returns, `durable` ones are on the disk or in the object store."""
        data = _encoded(records)
        if is_remote(self.path):
            self._lines.append(data)
            if durable:
                self.flush()
            return
        with self.path.open("ab") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())

    def flush(self) -> None:
        """Puts lines that were not appended durably into the object store; a local file has them."""
        if is_remote(self.path):
            write_bytes(self.path, b"".join(self._lines))

    def replace(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Writes the file anew with these objects."""
        data = _encoded(records)
        write_bytes(self.path, data)
        self._lines = [data] if is_remote(self.path) else []


def _lines(data: bytes) -> Iterator[tuple[bytes, Record | None]]:
    """Yields every whole line with its object, None where it is not one."""
    for line in data[: data.rfind(b"\n") + 1].splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        yield line, record if isinstance(record, dict) else None


def _encoded(records: Iterable[Mapping[str, Any]]) -> bytes:
    text = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    return text.encode("utf-8", "backslashreplace")  # names of files that are not UTF-8 become JSON's own escapes

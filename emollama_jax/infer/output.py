"""The answers of a run, one JSON object a line, in a file that survives a kill at any moment.

    answers.jsonl             the answers, each on the disk before the next clips are asked about
    answers.jsonl.run.json    what they are answers of: model, settings and questions; locked while the run writes

A run that goes on appends. What it answers anew stands below the old line, and the last line about a clip counts; when
all is done, the file is put in the order of the clips, each once.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from absl import logging

from emollama_jax.errors import UserError

Record = dict[str, Any]

TEXT = {"encoding": "utf-8", "errors": "backslashreplace"}  # of a name that is not UTF-8, JSON's own escapes


class OutputError(UserError):
    """The output cannot be gone on with: another process writes it, or it is damaged."""

    exit_code = 4


class Output:
    """An open output (see `open_output`).

    Attributes:
        known: the last record about each clip, by `key_of`.
    """

    def __init__(self, path: Path, run: IO[str], records: Sequence[Record]):
        self.known = {key_of(record): record for record in records}
        self._path, self._run = path, run
        self._order = [key_of(record) for record in records]

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Says what the answers are answers of, in JSON's types; to be called before any is written.

        Raises:
            UserError: those that are there are another run's.
            OutputError: nobody knows whose they are.
        """
        if self.known:
            self._run.seek(0)
            self._check_same(self._run.read(), identity)
        self._run.truncate(0)
        self._run.write(json.dumps(identity, indent=1, ensure_ascii=False) + "\n")
        self._run.flush()
        os.fsync(self._run.fileno())

    def _check_same(self, saved: str, identity: Mapping[str, Any]) -> None:
        try:
            before = dict(_flat(json.loads(saved)))
        except ValueError as error:
            raise OutputError(
                f"{self._run.name} is missing or damaged, so nobody knows whose answers there are in {self._path}; "
                "name another output"
            ) from error
        now = dict(_flat(json.loads(json.dumps(identity))))
        for name in (*now, *(name for name in before if name not in now)):
            if before.get(name) != now.get(name):
                raise UserError(
                    f"{name} was {before.get(name)!r} for the answers in {self._path} and is {now.get(name)!r} now; "
                    "set it back, or name another output"
                )

    def write(self, records: Sequence[Record]) -> None:
        """Appends records; when it returns, they are on the disk."""
        with self._path.open("a", **TEXT) as file:
            file.write("".join(map(_line, records)))
            file.flush()
            os.fsync(file.fileno())
        for record in records:
            self.known[key_of(record)] = record
            self._order.append(key_of(record))

    def finish(self, keys: Sequence[str | int]) -> None:
        """Puts the file in the order of these clips; those of others, which an earlier run wrote, come last."""
        asked = dict.fromkeys(keys)
        order = [key for key in asked if key in self.known] + [key for key in self.known if key not in asked]
        if order == self._order:
            return
        partial = self._path.with_name(f".{self._path.name}.partial")
        with partial.open("w", **TEXT) as file:
            file.writelines(_line(self.known[key]) for key in order)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self._path)
        self._order = order


def key_of(record: Mapping[str, Any]) -> str | int:
    """By which a record is found again: its number among the records of a data set, or its name."""
    return record.get("record", record["name"])


@contextlib.contextmanager
def open_output(path: Path, *, resume: bool) -> Iterator[Output]:
    """The output, locked until the block ends.

    Args:
        resume: go on with what is there, if anything.

    Raises:
        OutputError: another process writes it, or it is damaged.
        UserError: there is one already and `resume` is not asked for, or it cannot be written.
    """
    beside = path.with_name(f"{path.name}.run.json")
    is_there = UserError(f"the output exists already: {path}; give --resume to go on, or another name")
    if path.exists() and not resume and not beside.exists():
        raise is_there
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        run = beside.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the answers ({error.strerror}): {path}; choose another place") from error
    with run:
        try:
            fcntl.flock(run, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(f"another process writes this output: {path}; wait for it, or name another") from error
        if path.exists() and not resume:
            raise is_there
        try:
            yield Output(path, run, _read(path) if path.exists() else [])
        finally:
            if not os.fstat(run.fileno()).st_size:  # nothing came of it
                beside.unlink()


def _read(path: Path) -> list[Record]:
    """The records. A last line that was not finished is cut off."""
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    records = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            record = json.loads(line)
            key_of(record), record["status"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutputError(f"line {number} is damaged: {path}; mend or remove it, then --resume") from error
        records.append(record)
    if len(whole) < len(data):
        logging.warning("%s: the last line was not finished; its clip is asked about again", path)
        os.truncate(path, len(whole))
    return records


def _flat(tree: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, Mapping):
        yield where, tree
        return
    for name, value in tree.items():
        yield from _flat(value, f"{where}.{name}" if where else name)


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"

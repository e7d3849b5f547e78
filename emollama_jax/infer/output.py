"""The answers of a run, one JSON object a line, in a file that survives a kill at any moment.

    answers.jsonl             the answers, each on the disk before the next clips are asked about
    answers.jsonl.run.json    what they are answers of: model, settings and questions; locked while the run writes

A run that goes on appends. What it answers anew stands below the old line, and the last line about a clip counts; when
all is done, the file is put in the order of the clips, each once.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

from absl import logging
from etils import epath

from emollama_jax.errors import UserError
from emollama_jax.io.atomic import write_text
from emollama_jax.io.json_lines import JsonLinesFile, read_json_lines
from emollama_jax.io.locks import exclusive_lock, lock_file
from emollama_jax.io.paths import PathLike, as_path, is_remote

Record = dict[str, Any]


class OutputError(UserError):
    """The output cannot be gone on with: another process writes it, or it is damaged."""

    exit_code = 4


class Output:
    """An open output (see `open_output`).

    Attributes:
        known: the last record about each clip, by `key_of`.
    """

    def __init__(self, path: epath.Path, identity: epath.Path, lock: IO[str], records: Sequence[Record]):
        self.known = {key_of(record): record for record in records}
        self._file, self._identity, self._lock = JsonLinesFile(path), identity, lock
        self._order = [key_of(record) for record in records]

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Says what the answers are answers of, in JSON's types; to be called before any is written.

        Raises:
            UserError: those that are there are another run's.
            OutputError: nobody knows whose they are.
        """
        if self.known:
            self._check_same(self._identity.read_text() if self._identity.exists() else "", identity)
        text = json.dumps(identity, indent=1, ensure_ascii=False) + "\n"
        if is_remote(self._identity):
            write_text(self._identity, text)
            return
        self._lock.truncate(0)  # the file itself is locked, so it is not replaced
        self._lock.write(text)
        self._lock.flush()
        os.fsync(self._lock.fileno())

    def _check_same(self, saved: str, identity: Mapping[str, Any]) -> None:
        path = self._file.path
        try:
            before = dict(_flat(json.loads(saved)))
        except ValueError as error:
            raise OutputError(
                f"{self._identity} is missing or damaged, so nobody knows whose answers there are in {path}; "
                "name another output"
            ) from error
        now = dict(_flat(json.loads(json.dumps(identity))))
        for name in (*now, *(name for name in before if name not in now)):
            if before.get(name) != now.get(name):
                raise UserError(
                    f"{name} was {before.get(name)!r} for the answers in {path} and is {now.get(name)!r} now; "
                    "set it back, or name another output"
                )

    def write(self, records: Sequence[Record]) -> None:
        """Appends records; when it returns, they are on the disk."""
        self._file.append(records)
        for record in records:
            self.known[key_of(record)] = record
            self._order.append(key_of(record))

    def finish(self, keys: Sequence[str | int]) -> None:
        """Puts the file in the order of these clips; those of others, which an earlier run wrote, come last."""
        asked = dict.fromkeys(keys)
        order = [key for key in asked if key in self.known] + [key for key in self.known if key not in asked]
        if order != self._order:
            self._file.replace(self.known[key] for key in order)
            self._order = order


class PrintedOutput(Output):
    """An output that shows each record as a line of JSON and keeps no file.

    Args:
        show: is given each line, without its end.
    """

    def __init__(self, show: Callable[[str], None]):
        self.known, self._show = {}, show

    def __enter__(self) -> "PrintedOutput":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def write(self, records: Sequence[Record]) -> None:
        for record in records:
            self._show(json.dumps(record, ensure_ascii=False, allow_nan=False))
        self.known |= {key_of(record): record for record in records}

    def finish(self, keys: Sequence[str | int]) -> None:
        pass


def key_of(record: Mapping[str, Any]) -> str | int:
    """By which a record is found again: its number among the records of a data set, or its name."""
    return record.get("record", record["name"])


@contextlib.contextmanager
def open_output(path: PathLike, *, resume: bool) -> Iterator[Output]:
    """The output, locked until the block ends; one in an object store is locked for the processes of this machine.

    Args:
        resume: go on with what is there, if anything.

    Raises:
        OutputError: another process writes it, or it is damaged.
        UserError: there is one already and `resume` is not asked for, or it cannot be written.
    """
    out = as_path(path)
    identity = out.with_name(f"{out.name}.run.json")
    is_there = UserError(f"the output exists already: {path}; give --resume to go on, or another name")
    if out.exists() and not resume and not identity.exists():
        raise is_there
    busy = OutputError(f"another process writes this output: {path}; wait for it, or name another")
    with exclusive_lock(identity, busy) as lock:
        if out.exists() and not resume:
            raise is_there
        try:
            yield Output(out, identity, lock, _read(out) if out.exists() else [])
        finally:
            if not is_remote(out) and not os.fstat(lock.fileno()).st_size:  # nothing came of it
                lock_file(identity).unlink()


def _read(path: epath.Path) -> list[Record]:
    """Returns the records. A last line that was not finished is left out."""
    try:
        records = read_json_lines(path)
        for number, record in enumerate(records, 1):
            if not ({"record", "name"} & set(record) and "status" in record):
                raise ValueError(f"line {number} is damaged")
    except ValueError as error:
        raise OutputError(f"{error}: {path}; mend or remove it, then --resume") from error
    if not path.read_bytes().endswith(b"\n") and path.stat().length:
        logging.warning("%s: the last line was not finished; its clip is asked about again", path)
    return records


def _flat(tree: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, Mapping):
        yield where, tree
        return
    for name, value in tree.items():
        yield from _flat(value, f"{where}.{name}" if where else name)

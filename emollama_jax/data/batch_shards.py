"""Which parts of every batch a process reads, and streams whose place does not depend on who reads them.

A batch is made in parts, each packed on its own out of every n-th sample of one stream. A run keeps the number of
parts that it began with, so that its batches stay the same on any number of processes.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from emollama_jax.config import Config
from emollama_jax.data.batch import batch_sharding
from emollama_jax.errors import UserError

PARTS = "parts"  # in the state of an iterator: each part's own, by its number


@dataclass(frozen=True)
class ProcessRows:
    """The rows of every batch that a process reads.

    Attributes:
        num_parts: the parts of a batch.
        parts: the numbers of those that hold the process's rows.
        rows: the process's rows in their order, as places in these parts put behind each other.
    """

    num_parts: int
    parts: tuple[int, ...]
    rows: tuple[int, ...]


def process_shard(config: Config, mesh: Mesh) -> tuple[int, int]:
    """Choose (shard_index, num_shards) of this process: the equal part of every batch that holds its devices' rows.

    Processes whose devices hold the same rows read the same shard.

    Raises:
        UserError: the mesh does not split the rows evenly.
    """
    shards, mine = _row_ranges(config, mesh)
    return shards.index(mine), len(shards)


def process_rows(config: Config, mesh: Mesh, num_parts: int | None = None) -> ProcessRows:
    """Choose the rows that this process reads.

    Args:
        num_parts: of a run that began with other processes or another mesh; default: one for each process that has rows
            of its own, which then reads no more than these.

    Raises:
        UserError: the mesh does not split the rows evenly.
    """
    shards, mine = _row_ranges(config, mesh)
    part_rows = rows_per_shard(config, num_parts or len(shards))
    if num_parts in (None, len(shards)):
        return ProcessRows(len(shards), (shards.index(mine),), tuple(range(part_rows)))
    rows = [row for start, stop in mine for row in range(start, stop)]
    parts = tuple(sorted({row // part_rows for row in rows}))
    places = tuple(parts.index(row // part_rows) * part_rows + row % part_rows for row in rows)
    return ProcessRows(num_parts, parts, places)


def rows_per_shard(config: Config, num_shards: int) -> int:
    """Count the rows of one of `num_shards` equal shards of a batch. Raises UserError when they cannot be equal."""
    rows = config.data.batch_rows
    if rows % num_shards:
        raise UserError(f"data.batch_rows={rows}: must be a multiple of the {num_shards} processes")
    return rows // num_shards


Ranges = tuple[tuple[int, int], ...]  # of rows, each from its first to the one after its last


def _row_ranges(config: Config, mesh: Mesh) -> tuple[list[Ranges], Ranges]:
    """The rows of every process, each once, and those of this one."""
    total = config.data.batch_rows
    sharding = batch_sharding(mesh, config.sharding, (total,))
    by_process: dict[int, set[tuple[int, int]]] = {}
    for device, (rows,) in sharding.devices_indices_map((total,)).items():
        start, stop, _ = rows.indices(total)
        by_process.setdefault(device.process_index, set()).add((start, stop))
    shards = sorted({tuple(sorted(ranges)) for ranges in by_process.values()})
    if sum(stop - start for shard in shards for start, stop in shard) != total:
        raise UserError(
            f"data.batch_rows={total}: the mesh splits them unevenly over processes; give a multiple of the mesh's "
            "data x fsdp"
        )
    return shards, tuple(sorted(by_process[jax.process_index()]))


class JoinedParts(grain.IterDataset):
    """Batches of a process's rows, out of the batches of the parts that hold them.

    The state of an iterator has that of each part by its number; it can be set to one that has more parts.
    """

    def __init__(self, datasets: Sequence[grain.IterDataset], rows: ProcessRows):
        super().__init__(datasets)
        self._rows = rows

    def __iter__(self) -> grain.DatasetIterator:
        return _JoinedIterator([iter(dataset) for dataset in self.parents], self._rows)


class _JoinedIterator(grain.DatasetIterator):
    def __init__(self, iterators: Sequence[grain.DatasetIterator], rows: ProcessRows):
        super().__init__(iterators)
        self._rows = rows

    def __next__(self) -> Any:
        found = [next(iterator) for iterator in self._parents]
        take = lambda *arrays: np.concatenate(arrays)[list(self._rows.rows)]
        whole = len(found) == 1 and len(self._rows.rows) == len(jax.tree.leaves(found[0])[0])
        return found[0] if whole else jax.tree.map(take, *found)

    def get_state(self) -> dict[str, Any]:
        parts = zip(self._rows.parts, self._parents, strict=True)
        return {PARTS: {str(part): iterator.get_state() for part, iterator in parts}}

    def set_state(self, state: dict[str, Any]) -> None:
        for part, iterator in zip(self._rows.parts, self._parents, strict=True):
            # Runs that are older than parts keep the state of the only one as it is.
            iterator.set_state(state[PARTS][str(part)] if PARTS in state else state)


class StreamReader(grain.IterDataset):
    """The elements of a stream in their order. The state of an iterator is the number of those taken, whoever reads."""

    def __init__(self, stream: grain.MapDataset, read: Callable[[grain.MapDataset], grain.IterDataset]):
        """`read` makes what reads a stream from its beginning."""
        super().__init__()
        self._stream, self._read = stream, read

    def __iter__(self) -> grain.DatasetIterator:
        return _StreamIterator(self._stream, self._read)


class _StreamIterator(grain.DatasetIterator):
    def __init__(self, stream: grain.MapDataset, read: Callable[[grain.MapDataset], grain.IterDataset]):
        super().__init__()
        self._stream, self._read = stream, read
        self._taken, self._iterator = 0, None

    def start_prefetch(self) -> None:
        if self._iterator is None:
            self._iterator = iter(self._read(self._stream[self._taken :] if self._taken else self._stream))
            self._iterator.start_prefetch()

    def __next__(self) -> Any:
        self._assert_not_closed()
        self.start_prefetch()
        element = next(self._iterator)
        self._taken += 1
        return element

    def get_state(self) -> dict[str, Any]:
        return {"next_index": self._taken}

    def set_state(self, state: dict[str, Any]) -> None:
        self._stop()
        self._taken = _count_taken(state)

    def close(self) -> None:
        self._stop()
        super().close()

    def _stop(self) -> None:
        if self._iterator is not None:
            with contextlib.suppress(Exception):  # a reader that failed may fail again as it ends
                self._iterator.close()
            self._iterator = None


def _count_taken(state: dict[str, Any]) -> int:
    """The number of elements taken, also where an older run says how many of them each worker process read."""
    if "next_index" in state:
        return int(state["next_index"])
    workers = state["iterators_in_use_states"]
    return sum(_count_taken(worker) for worker in workers)

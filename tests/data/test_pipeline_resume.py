"""The stream of batches goes on from any point, with any number of workers and processes."""

import grain
import jax
import numpy as np
import pytest

from emollama_jax.data import batch_shards, pipeline
from emollama_jax.data.batch import Batch
from emollama_jax.data.batch_shards import ProcessRows, StreamReader, process_rows
from emollama_jax.data.pipeline import eval_dataset, onto_devices, train_batches, train_dataset
from emollama_jax.sharding import make_mesh
from tests.data.batches import assert_same, config_of
from tests.data.prepared import TOKENIZER


@pytest.mark.parametrize(
    ("kind", "workers"), [("train", 0), ("eval", 0), pytest.param("train", 2, marks=pytest.mark.slow)]
)
def test_restoring_at_every_state(folder, kind, workers):
    rows = 8 if workers else 4  # fewer batches, and at each of them workers begin anew
    config = config_of(folder, workers=workers, read_ahead=4, batch_rows=rows)
    dataset = train_dataset(config, TOKENIZER, epochs=1) if kind == "train" else eval_dataset(config, TOKENIZER)
    grain.experimental.assert_equal_output_after_checkpoint(dataset.map(vars))


def test_restoring_on_devices(folder):
    """The batches that wait on the devices come again: the state is that of the last one handed out."""
    config, mesh = config_of(folder, prefetch=3), make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    make = lambda: iter(onto_devices(train_dataset(config, TOKENIZER, epochs=1), config, mesh))
    iterator, states, found = make(), [], []
    while True:
        states.append(iterator.get_state())
        batch = next(iterator, None)
        if batch is None:
            break
        found.append(jax.tree.map(np.asarray, batch))
    assert len(found) > 3
    for start in (0, 2, len(found) - 1):
        again = make()
        again.set_state(states[start])
        assert_same([jax.tree.map(np.asarray, batch) for batch in again], found[start:])


def test_the_state_does_not_depend_on_workers(folder):
    """Nor do the batches, so that it is restored with any number of them."""
    alone, helped = (taken(train_dataset(config_of(folder, workers=n), TOKENIZER), 3) for n in (0, 2))
    assert_same(alone[0], helped[0])
    assert alone[1] == helped[1]


def test_the_state_of_workers_in_an_older_run_is_understood(folder):
    """Grain keeps what each of them has read."""
    stream = grain.MapDataset.range(40)
    old = iter(pipeline._read_ahead(stream, config_of(folder, workers=2).data))
    for _ in range(7):
        next(old)
    reader = iter(StreamReader(stream, lambda rest: rest.to_iter_dataset()))
    reader.set_state(old.get_state())
    old.close()
    assert next(reader) == 7 and reader.get_state() == {"next_index": 8}


ROWS_OF_PROCESSES = {
    "one": [((0, 4),)],
    "two": [((0, 2),), ((2, 4),)],
    "four": [((i, i + 1),) for i in range(4)],
    "interleaved": [((0, 1), (2, 3)), ((1, 2), (3, 4))],
}


def taken(dataset, count: int, state=None) -> tuple[list[Batch], dict]:
    """So many batches from a state on, and the state after them."""
    iterator = iter(dataset)
    if state is not None:
        iterator.set_state(state)
    found = [next(iterator) for _ in range(count)], iterator.get_state()
    iterator.close()
    return found


@pytest.mark.parametrize("began", ["one", "two", "four"])
def test_any_number_of_processes_goes_on_with_the_batches_of_a_run(folder, began, monkeypatch):
    config, mesh = config_of(folder), make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])

    def rows_of(layout: str, mine: int, parts: int | None) -> ProcessRows:
        shards = ROWS_OF_PROCESSES[layout]
        monkeypatch.setattr(batch_shards, "_row_ranges", lambda *arguments: (shards, shards[mine]))
        return process_rows(config, mesh, parts)

    def all_rows(layout: str, parts: int | None, state: dict | None) -> tuple[list[Batch], dict]:
        """Three batches of all processes, and their states together."""
        whole, states, order = [], {}, []
        for mine, ranges in enumerate(ROWS_OF_PROCESSES[layout]):
            rows = rows_of(layout, mine, parts)
            assert parts is not None or len(rows.parts) == 1  # as a run begins, nobody reads more than its own
            found, after = taken(train_batches(config, TOKENIZER, rows), 3, state)
            whole.append(found)
            states |= after["parts"]
            order += [row for start, stop in ranges for row in range(start, stop)]
        join = lambda *arrays: np.concatenate(arrays)[np.argsort(order)]
        return [jax.tree.map(join, *batch) for batch in zip(*whole, strict=True)], {"parts": states}

    _, state = all_rows(began, None, None)
    expected, after = all_rows(began, None, state)
    for layout in ROWS_OF_PROCESSES:
        if (began, layout) == ("two", "interleaved"):
            continue  # as many processes with other rows: the same parts, elsewhere in the batch
        parts = len(ROWS_OF_PROCESSES[began])
        found, found_after = all_rows(layout, parts, state)
        assert_same(found, expected)
        assert found_after == after

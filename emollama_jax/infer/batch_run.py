"""A model's answers about many clips, in a file: batch by batch, each on the disk before the next, and resumable.

A record of the output, keys in this order:

    name                what the clip is called
    record              its number among the records, where it is one of a data set; else `video`, its path
    status              success or error
    stage, error        of an error: manifest (its line), read (its file), prompt (too long) or model (not finite)
    answer              of a success: the most likely label, or the generated text
    answers             all answers, where several questions were asked
    probabilities       of each label, the most likely first, where no question was asked
    subtitle            what the person says, as the model was told
    clip                what was seen and heard: the frame taken, faces found, ...
    fingerprint         of all that was read of the clip
    timings_s           seconds by kind of work; what a batch took together is divided by its clips

Batches are fixed by the order of the clips. A batch that was cut off is computed again as a whole, so that a run which
was stopped anywhere gives the very numbers of one that was not.
"""

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from emollama_jax.errors import UserError
from emollama_jax.infer.answer import ClipAnswer, ClipError, Query
from emollama_jax.infer.clip_input import ClipInput
from emollama_jax.infer.inputs import ClipSource, Item, ItemRead
from emollama_jax.infer.output import Output, Record

THREADS = 8  # that read files for their fingerprints
DIGITS = 6  # of a probability


@dataclass
class Summary:
    """Counts of a run's clips."""

    clips: int
    kept: int = 0
    """Answered by an earlier run."""
    failed: Counter[str] = field(default_factory=Counter)
    """Clips without an answer, by stage."""
    wordless: int = 0
    """Answered without a subtitle."""
    noted: int = 0
    """Of which something could not be read: `clip.notes` says what."""

    def __str__(self) -> str:
        failed = self.failed.total()
        why = f" ({', '.join(f'{stage} {count}' for stage, count in sorted(self.failed.items()))})" if failed else ""
        kept = f", {self.kept:,} of them before" if self.kept else ""
        without = f", {self.wordless:,} without a subtitle" if self.wordless else ""
        noted = f", {self.noted:,} with notes on what could not be read of them" if self.noted else ""
        return f"{self.clips:,} clips: {self.clips - failed:,} answered{kept}, {failed:,} failed{why}{without}{noted}"


@runtime_checkable
class Answerer(Protocol):
    """What answers about clips that were read: an `Engine`, or a server that has one."""

    def answer_batch(
        self,
        queries: Sequence[Query],
        clips: Sequence[tuple[Item, ItemRead]],
        encode: Callable[[Sequence[Item], Sequence[ItemRead]], list[ClipInput]],
    ) -> list[ClipAnswer | ClipError]:
        """See `Engine.answer_batch`."""
        ...


def answer_all(
    engine: Answerer,
    items: Sequence[Item],
    source: ClipSource,
    output: Output,
    *,
    questions: Sequence[str] = (),
    batch_size: int = 16,
    progress: Callable[[int], None] = lambda count: None,
) -> Summary:
    """Ask about every clip without an answer in the output, retries errors, and puts the output in order.

    Args:
        questions: of clips that have none of their own, asked one after another; without any the labels are scored.
        progress: is told how many more clips are done.
    """
    kept = _answered(items, source, output)
    batches = list(_batches(items, output, kept, batch_size))
    readable = [item for batch in batches for item in batch if not item.fault]
    progress(len(items) - sum(map(len, batches)))
    with contextlib.closing(source.read(readable)) as reads:
        for batch in batches:
            whole = [item for item in batch if not item.fault]
            read = list(itertools.islice(reads, len(whole)))
            results = _ask(engine, source, whole, read, questions)
            records = [_error(item, "manifest", item.fault) if item.fault else results[item.key] for item in batch]
            output.write([r for item, r in zip(batch, records, strict=True) if item.key not in kept])
            progress(len(batch))
    output.finish([item.key for item in items])
    records = [output.known[item.key] for item in items]
    answered = [record for record in records if record["status"] == "success"]
    return Summary(
        len(items),
        len(kept),
        Counter(record["stage"] for record in records if record["status"] == "error"),
        wordless=sum(not record["subtitle"] for record in answered),
        noted=sum("notes" in record["clip"] for record in answered),
    )


def _answered(items: Sequence[Item], source: ClipSource, output: Output) -> set[str | int]:
    """Return the keys of clips whose answers have the fingerprint that would be read now."""
    known = output.known
    possible = [i for i in items if not i.fault and i.key in known and known[i.key]["status"] == "success"]
    with ThreadPoolExecutor(THREADS) as pool:
        now = pool.map(source.fingerprint, possible)
        return {item.key for item, one in zip(possible, now, strict=True) if known[item.key].get("fingerprint") == one}


def _batches(items: Sequence[Item], output: Output, kept: set[str | int], batch_size: int) -> Iterator[Sequence[Item]]:
    """Yield the batches to compute: a whole one where a clip in it was never tried, else its clips that failed."""
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        failed = [item for item in batch if output.known.get(item.key, {}).get("status") == "error"]
        if len(failed) + sum(item.key in kept for item in batch) < len(batch):
            yield batch
        elif failed:
            yield failed


def _ask(
    engine: Answerer,
    source: ClipSource,
    items: Sequence[Item],
    reads: Sequence[ItemRead | UserError],
    questions: Sequence[str],
) -> dict[str | int, Record]:
    """Return the records of a batch, by `Item.key`."""
    records = {
        item.key: _error(item, "read", str(read))
        for item, read in zip(items, reads, strict=True)
        if isinstance(read, UserError)
    }
    good = [(item, read) for item, read in zip(items, reads, strict=True) if item.key not in records]
    queries = [Query(item.name, (item.question,) if item.question else tuple(questions)) for item, _ in good]
    results = engine.answer_batch(queries, good, source.encode) if good else []
    for (item, _), result in zip(good, results, strict=True):
        records[item.key] = _record(item, result)
    return records


def _record(item: Item, result: ClipAnswer | ClipError) -> Record:
    if isinstance(result, ClipError):
        return _error(item, result.stage, str(result), result.name)
    return {**_head(item, result.name), **answer_fields(result)}


def answer_fields(result: ClipAnswer) -> Record:
    """Return the fields of a success, from `status` on, in JSON's types."""
    probabilities = {label: round(probability, DIGITS) for label, probability in result.probabilities.items()}
    return {
        "status": "success",
        "answer": result.answer,
        **({"answers": list(result.answers)} if len(result.answers) > 1 else {}),
        **({"probabilities": probabilities} if probabilities else {}),
        "subtitle": result.subtitle,
        "clip": dict(result.clip_info),
        "fingerprint": result.fingerprint,
        "timings_s": {kind: round(seconds, 4) for kind, seconds in result.timings_s.items()},
    }


def _head(item: Item, name: str) -> Record:
    record: Record = {"name": name}
    if item.index is not None:
        record["record"] = item.index
    if item.video is not None:
        record["video"] = str(item.video)
    return record


def _error(item: Item, stage: str, message: str, name: str | None = None) -> Record:
    return {**_head(item, name or item.name), "status": "error", "stage": stage, "error": message}

"""Answers about many clips: batch by batch on the devices, each batch on the disk before the next, resumable.

A record of the output, keys in this order:

    name                what the clip is called
    record              its number among the records, where it is one of a data set; else `video`, its path
    status              success or error
    stage, error        of an error: manifest (its line), read (its file), prompt (too long) or model (not finite)
    answer              of a success: the most likely label, or the text that was generated
    answers             all of them, where several questions were asked
    probabilities       of each label, the likeliest first
    subtitle            what the person says, as the model was told
    clip                what was seen and heard: the frame taken, faces found, ...
    fingerprint         of all that was read of it
    timings_s           seconds by kind of work; what a batch took together is divided by its clips

Batches are fixed by the order of the clips. Where a batch was cut off, all of it is computed again, so that a run which
was stopped anywhere gives the very numbers of one that was not.
"""

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from emollama_jax.errors import UserError
from emollama_jax.infer.inputs import ClipSource, Item, ItemRead
from emollama_jax.infer.output import Output, Record
from emollama_jax.infer.predictor import ClipInput, Predictor
from emollama_jax.io.stopwatch import Stopwatch

THREADS = 8  # that read files for their fingerprints
DIGITS = 6  # of a probability


@dataclass(frozen=True)
class Asked:
    """What each clip is asked.

    Attributes:
        requests: one after another (see `requests_of`); none asks for the most likely label.
    """

    requests: tuple[str, ...] = ()

    def of(self, item: Item) -> tuple[str, ...]:
        """What this one is asked."""
        return (item.question,) if item.question else self.requests


@dataclass
class Summary:
    """How a run went."""

    clips: int
    kept: int = 0
    """Answered by an earlier run."""
    failed: Counter[str] = field(default_factory=Counter)
    """Clips without an answer, by stage."""

    def __str__(self) -> str:
        failed = self.failed.total()
        why = f" ({', '.join(f'{stage} {count}' for stage, count in sorted(self.failed.items()))})" if failed else ""
        kept = f", {self.kept:,} of them before" if self.kept else ""
        return f"{self.clips:,} clips: {self.clips - failed:,} answered{kept}, {failed:,} failed{why}"


def answer_all(
    items: Sequence[Item],
    source: ClipSource,
    predictor: Predictor,
    asked: Asked,
    output: Output,
    *,
    batch_size: int = 16,
    progress: Callable[[int], None] = lambda count: None,
) -> Summary:
    """Asks about every clip that the output has no answer to yet, errors anew, and puts the output in order.

    Args:
        progress: is told how many more clips are done.
    """
    kept = _answered(items, source, output)
    batches = list(_batches(items, output, kept, batch_size))
    readable = [item for batch in batches for item in batch if not item.fault]
    progress(len(items) - sum(map(len, batches)))
    with contextlib.closing(source.read(readable)) as reads:
        for batch in batches:
            whole = [item.key for item in batch if not item.fault]
            found = dict(zip(whole, itertools.islice(reads, len(whole)), strict=True))
            records = _records(batch, found, source, predictor, asked)
            output.write([r for item, r in zip(batch, records, strict=True) if item.key not in kept])
            progress(len(batch))
    output.finish([item.key for item in items])
    failed = [output.known[item.key] for item in items if output.known[item.key]["status"] == "error"]
    return Summary(len(items), len(kept), Counter(record["stage"] for record in failed))


def _answered(items: Sequence[Item], source: ClipSource, output: Output) -> set[str | int]:
    """The clips whose answers in the output are of what would be read now."""
    known = output.known
    possible = [i for i in items if not i.fault and i.key in known and known[i.key]["status"] == "success"]
    with ThreadPoolExecutor(THREADS) as pool:
        now = pool.map(source.fingerprint, possible)
        return {item.key for item, one in zip(possible, now, strict=True) if known[item.key].get("fingerprint") == one}


def _batches(items: Sequence[Item], output: Output, kept: set[str | int], batch_size: int) -> Iterator[Sequence[Item]]:
    """What is computed together: whole batches of which something is missing, of others what failed in them."""
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        failed = [item for item in batch if output.known.get(item.key, {}).get("status") == "error"]
        if len(failed) + sum(item.key in kept for item in batch) < len(batch):
            yield batch
        elif failed:
            yield failed


def _records(
    batch: Sequence[Item],
    reads: dict[str | int, ItemRead | UserError],
    source: ClipSource,
    predictor: Predictor,
    asked: Asked,
) -> list[Record]:
    """The records of a batch."""
    records: dict[str | int, Record] = {}
    good: list[tuple[Item, ItemRead]] = []
    for item in batch:
        read = reads.get(item.key)
        if isinstance(read, ItemRead):
            good.append((item, read))
        else:
            records[item.key] = _error(item, "manifest" if item.fault else "read", item.fault or str(read))
    clock = Stopwatch()
    with clock("encode"):
        clips = source.encode([item for item, _ in good], [read for _, read in good]) if good else []
    fitting: list[tuple[Item, ItemRead, ClipInput]] = []
    for (item, read), clip in zip(good, clips, strict=True):
        try:
            predictor.check(clip, asked.of(item))
            fitting.append((item, read, clip))
        except UserError as error:
            records[item.key] = _error(item, "prompt", str(error), clip.name)
    if fitting:
        for (item, _, _), record in zip(fitting, _ask(fitting, predictor, asked, clock), strict=True):
            records[item.key] = record
    return [records[item.key] for item in batch]


def _ask(
    batch: Sequence[tuple[Item, ItemRead, ClipInput]], predictor: Predictor, asked: Asked, clock: Stopwatch
) -> list[Record]:
    """The records of clips that can be asked about."""
    clips, requests = [clip for _, _, clip in batch], [asked.of(item) for item, _, _ in batch]
    with clock("label"):
        soft = predictor.soft_tokens(clips)
        scores = predictor.labels(clips, soft)
    answers: list[list[str]] = [[] for _ in batch]
    if any(requests):
        with clock("generate"):
            answers = predictor.answers(clips, soft, requests)
    shared = {kind: seconds / len(batch) for kind, seconds in clock.seconds.items()}
    records = []
    for i, (item, read, clip) in enumerate(batch):
        probabilities = dict(zip(scores.labels, map(float, scores.probabilities[i]), strict=True))
        if not np.isfinite([*probabilities.values()]).all():
            message = "the labels' probabilities are not finite; compute in float32 (config.llama.compute_dtype)"
            records.append(_error(item, "model", message, clip.name))
            continue
        likeliest = sorted(scores.labels, key=lambda label: -probabilities[label])
        records.append(
            {
                **_head(item, clip.name),
                "status": "success",
                "answer": answers[i][-1] if answers[i] else likeliest[0],
                **({"answers": answers[i]} if len(answers[i]) > 1 else {}),
                "probabilities": {label: round(probabilities[label], DIGITS) for label in likeliest},
                "subtitle": clip.subtitle,
                "clip": read.clip_info,
                "fingerprint": read.fingerprint,
                "timings_s": {kind: round(s, 4) for kind, s in (read.seconds | shared).items()},
            }
        )
    return records


def _head(item: Item, name: str) -> Record:
    record: Record = {"name": name}
    if item.index is not None:
        record["record"] = item.index
    if item.video is not None:
        record["video"] = str(item.video)
    return record


def _error(item: Item, stage: str, message: str, name: str | None = None) -> Record:
    return {**_head(item, name or item.name), "status": "error", "stage": stage, "error": message}

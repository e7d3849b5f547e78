"""Answers and labels in files: those of `emollama predict`, of other systems, and of data sets.

A file of answers is a .csv with a header, or .jsonl: `name`, and `answer` (or prediction, response); `emotion` (or
label, discrete), where it is there, is the clip's own label. Clips are matched by name, as everywhere: "7", "00007" and
"00007.mp4" are one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from emollama_jax.data.annotations import ALIASES
from emollama_jax.data.records import Records
from emollama_jax.data.tables import Problem, key_of, read_rows
from emollama_jax.errors import UserError
from emollama_jax.eval.benchmarks import Benchmark, evaluate
from emollama_jax.eval.sweep import Evaluated, Prediction
from emollama_jax.text.answers import parse_label


@dataclass(frozen=True)
class Answers:
    """The answers in a file, by `key_of` the clip's name; None where it has a line without one.

    Attributes:
        emotions: the labels beside them.
    """

    answers: dict[str, str | None]
    emotions: dict[str, str]


@dataclass(frozen=True)
class Matched:
    """An evaluation of a file, and what did not match: clips without an answer, which count as invalid, and answers
    about other clips, which do not count."""

    evaluated: Evaluated
    missing: tuple[str, ...]
    others: tuple[str, ...]


def read_answers(path: Path) -> Answers:
    """The answers in a file.

    Raises:
        UserError: it cannot be read, a line of it cannot, has no name, or names a clip again.
    """
    rows = _rows(path, ("name", "answer"))
    answers: dict[str, str | None] = {}
    emotions: dict[str, str] = {}
    for line, fields in rows:
        key = key_of(fields["name"])
        if key in answers:
            raise UserError(f"{path}:{line}: {fields['name']!r} has an answer already; keep one of them")
        answers[key] = fields.get("answer")
        if "emotion" in fields:
            emotions[key] = fields["emotion"]
    return Answers(answers, emotions)


def read_labels(path: Path, field: str = "emotion") -> dict[str, str]:
    """The labels (or another field of COLUMNS) in a list or table, by `key_of` the clip's name.

    Raises:
        UserError: as `read_answers`, or there are none.
    """
    found = {key_of(fields["name"]): fields[field] for _, fields in _rows(path, ("name", field)) if field in fields}
    if not found:
        raise UserError(f"no {field} in {path}; give a list of names and labels")
    return found


def labels_of_records(records: Records, field: str = "emotion") -> dict[str, str]:
    """The same of the records of a split."""
    found: dict[str, str] = {}
    for record in (records[i] for i in range(len(records))):
        value = record[field]
        if field == "emotion":
            value = records.metadata["labels"][value] if value >= 0 else ""
        if value:
            found[key_of(record["name"])] = value
    return found


def _rows(path: Path, needs: tuple[str, ...]) -> list[tuple[int | None, dict]]:
    problems: list[Problem] = []
    rows = [(row.line, row.fields) for row in read_rows(path, problems, needs)]
    if problems:
        raise UserError(str(problems[0]))
    if nameless := [line for line, fields in rows if "name" not in fields]:
        raise UserError(f"{path}:{nameless[0]}: no name; give one")
    return rows


def evaluate_answers(
    answers: Answers, truth: Mapping[str, str], benchmark: Benchmark, *, invalid: str = "invalid"
) -> Matched:
    """The answers about the clips of `truth` (labels by `key_of` a name), judged.

    Raises:
        UserError: no answer is about any of the clips, or a label is none of the benchmark's.
    """
    if not answers.answers.keys() & truth.keys():
        raise UserError("no answer is about a clip with a label; check that both name the clips alike")
    predictions = []
    for key, emotion in truth.items():
        text = answers.answers.get(key) or ""
        own = emotion.strip().lower()
        own = own if own in benchmark.labels else ALIASES.get(own, own)
        predictions.append(Prediction(key, own, text, parse_label(text, benchmark.labels)))
    emotions, labels = [p.emotion for p in predictions], [p.label for p in predictions]
    evaluation = evaluate(benchmark, emotions, labels, invalid=invalid)
    missing = tuple(key for key in truth if answers.answers.get(key) is None)
    others = tuple(key for key in answers.answers if key not in truth)
    return Matched(Evaluated(evaluation, tuple(predictions)), missing, others)

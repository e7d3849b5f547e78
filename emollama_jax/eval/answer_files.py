"""Answers and labels in files: those of `emollama predict`, of other systems, and of data sets.

A file of answers is a table or .jsonl, as `data/tables.py` reads them: `name`, and `answer` (or prediction, response);
`emotion` (or label, discrete), where it is there, is the clip's own label. Other forms of answers have no such column:
MER's submissions are `name,discrete`, the reference writes `names,chi_reasons`. Clips are matched by name, as
everywhere: "7", "00007" and "00007.mp4" are one.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from emollama_jax.data.problems import Problem
from emollama_jax.data.records import Records
from emollama_jax.data.tables import Row, key_of, read_rows
from emollama_jax.errors import UserError
from emollama_jax.eval.benchmarks import Benchmark, evaluate
from emollama_jax.eval.open_vocabulary import combined_score
from emollama_jax.eval.sweep import Evaluated, Prediction
from emollama_jax.text.answers import parse_label
from emollama_jax.text.labels import split_labels


@dataclass(frozen=True)
class Answers:
    """The answers in a file, by `key_of` the clip's name; None where it has a line without one.

    Attributes:
        emotions: the labels beside them.
        valences: the valences beside them, which in a submission to MER2023 are answers, too.
    """

    answers: dict[str, str | None]
    emotions: dict[str, str]
    valences: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Matched:
    """An evaluation of a file, and what did not match: clips without an answer, which count as invalid, and answers
    about other clips, which do not count."""

    evaluated: Evaluated
    missing: tuple[str, ...]
    others: tuple[str, ...]


def read_answers(path: Path, fields: Sequence[str] = ("answer",)) -> Answers:
    """The answers in a file.

    Args:
        fields: of `tables.COLUMNS`, those that may hold the answers; the first that any line has filled does. Labels
            are beside the answers only where these do not stand in `emotion`.

    Raises:
        UserError: it cannot be read, a line of it cannot, has no name, or names a clip again; or there is no answer.
    """
    rows = _rows(path, ("name", tuple(fields)))
    holder = next((one for one in fields if any(one in row.fields for row in rows.values())), None)
    if holder is None:
        raise UserError(f"no answer in {path}; give a .csv or .jsonl of names and answers")
    answers = {key: row.fields.get(holder) for key, row in rows.items()}
    beside = {key: row.fields["emotion"] for key, row in rows.items() if "emotion" in row.fields}
    valences = {key: row.fields["valence"] for key, row in rows.items() if "valence" in row.fields}
    return Answers(answers, beside if holder != "emotion" else {}, valences)


def read_labels(path: Path, field: str = "emotion", *, none_needed: bool = False) -> dict[str, Any]:
    """The labels (or another field of COLUMNS) in a list or table, by `key_of` the clip's name.

    Args:
        none_needed: whether a file without any is none to complain of.

    Raises:
        UserError: as `read_answers`, or there are none.
    """
    rows = _rows(path, ("name",) if none_needed else ("name", field))
    found = {key: row.fields[field] for key, row in rows.items() if field in row.fields}
    if not found and not none_needed:
        raise UserError(f"no {field} in {path}; give a list of names and labels")
    return found


def read_names(path: Path) -> list[str]:
    """The names of clips in a list or table. Raises UserError as `read_answers`, or where there are none."""
    if not (names := [row.fields["name"] for row in _rows(path, ("name",)).values()]):
        raise UserError(f"no names in {path}; give one clip a line")
    return names


def labels_of_records(splits: Iterable[Records], field: str = "emotion") -> dict[str, str]:
    """The same of the records of splits, which may share clips.

    Raises:
        UserError: two of them say something else of a clip.
    """
    found: dict[str, str] = {}
    for records in splits:
        for record in (records[i] for i in range(len(records))):
            value = record[field]
            if field == "emotion":
                value = records.metadata["labels"][value] if value >= 0 else ""
            if value and found.setdefault(key_of(record["name"]), value) != value:
                before = found[key_of(record["name"])]
                where = f"{records.path}:{records.split}"
                raise UserError(f"{where}: {record['name']!r} is {value!r}, and {before!r} in data before it; give one")
    return found


def _rows(path: Path, needs: tuple[str | tuple[str, ...], ...]) -> dict[str, Row]:
    """The rows by `key_of` the clip's name."""
    problems: list[Problem] = []
    rows: dict[str, Row] = {}
    for row in read_rows(path, problems, needs):
        if "name" not in row.fields:
            raise UserError(f"{path}:{row.line}: no name; give one")
        name, key = row.fields["name"], key_of(row.fields["name"])
        if key in rows:
            raise UserError(f"{path}:{row.line}: {name!r} is the clip of line {rows[key].line}; keep one of them")
        rows[key] = row
    if problems:
        raise UserError(str(problems[0]))
    return rows


def evaluate_answers(
    answers: Answers,
    truth: Mapping[str, str],
    benchmark: Benchmark,
    *,
    invalid: str = "invalid",
    valences: Mapping[str, float] | None = None,
) -> Matched:
    """The answers about the clips of `truth` (labels by `key_of` a name), judged.

    A clip may have several labels, as in "surprise, happy": any of them is right, and a clip whose answer is none of
    them counts under the first.

    Args:
        valences: of the clips. Where the answers have valences too, the evaluation gets MER2023's combined ranking.

    Raises:
        UserError: no answer is about any of the clips, or a label is none of the benchmark's.
    """
    if not answers.answers.keys() & truth.keys():
        raise UserError("no answer is about a clip with a label; check that both name the clips alike")
    predictions = []
    for key, emotion in truth.items():
        text = answers.answers.get(key) or ""
        said = parse_label(text, benchmark.labels)
        own = [benchmark.label(part) for part in ([emotion] if benchmark.label(emotion) else split_labels(emotion))]
        if not own or None in own:
            hint = "say from which number on labels are counted" if emotion.isdecimal() else "add it, or mend it"
            raise UserError(f"{key} has the label {emotion!r}, none of {', '.join(benchmark.labels)}; {hint}")
        predictions.append(Prediction(key, said if said in own else own[0], text, said))
    emotions, labels = [p.emotion for p in predictions], [p.label for p in predictions]
    evaluation = evaluate(benchmark, emotions, labels, invalid=invalid)
    if both := [key for key in truth if key in (valences or {}) and key in answers.valences]:
        of_clips, said_of_clips = ([some[key] for key in both] for some in (valences, answers.valences))
        error = float(np.mean(np.subtract(of_clips, said_of_clips) ** 2))
        combined = combined_score(evaluation.scores["weighted_f1"], of_clips, said_of_clips)
        evaluation = replace(evaluation, valence={"clips": len(both), "mse": error, "combined": combined})
    missing = tuple(key for key in truth if answers.answers.get(key) is None)
    others = tuple(key for key in answers.answers if key not in truth)
    return Matched(Evaluated(evaluation, tuple(predictions)), missing, others)

"""Evaluations of open-vocabulary labels as JSON and as Markdown beside the published rows."""

from collections.abc import Mapping
from typing import Any

from emollama_jax.eval.report import OURS, table
from emollama_jax.eval.unibench import HEADINGS, UNIBENCH, UNIBENCH_MEANS, OpenEvaluation, unibench_mean
from emollama_jax.eval.wheels import EmotionWheels
from emollama_jax.io.atomic import write_json, write_text
from emollama_jax.io.paths import PathLike, as_path


def to_dict(evaluation: OpenEvaluation, wheels: EmotionWheels, labels_from: str) -> dict[str, Any]:
    """Everything, in JSON's types; values are fractions of 1.

    Args:
        labels_from: how the labels came out of descriptions, or "as given".
    """
    return {
        "benchmark": evaluation.open_set.name,
        "clips": evaluation.clips,
        "clips_of_benchmark": evaluation.open_set.clips,
        "scored": evaluation.scored,
        "unanswered": list(evaluation.unanswered),
        "scores": evaluation.scores,
        "interval_level": evaluation.level,
        "intervals": {name: list(interval) for name, interval in evaluation.intervals.items()},
        "floors": evaluation.floors,
        "labels_from": labels_from,
        "wheels": {"origin": wheels.origin, "fingerprint": wheels.fingerprint},
        "published": [{"who": row.who, "scores": dict(row.scores)} for row in evaluation.open_set.published],
    }


def to_markdown(evaluation: OpenEvaluation, wheels: EmotionWheels, labels_from: str) -> str:
    """The page of one set: scores with their intervals, the floors of constant answers, published rows; in percent."""
    names = [name for name in HEADINGS if name in evaluation.scores]
    rows = [[f"**{OURS}**", *(_with_interval(evaluation, name) for name in names)]]
    rows += [[f"floor: {who}", *(_cell(name, scores) for name in names)] for who, scores in evaluation.floors.items()]
    rows += [[row.who, *(_cell(name, row.scores) for name in names)] for row in evaluation.open_set.published]
    counts = f"{evaluation.clips} clips, {evaluation.scored} scored, {len(evaluation.unanswered)} without an answer"
    lines = [f"# {evaluation.open_set.title}", "", f"{counts}; percent, with {100 * evaluation.level:g} % intervals."]
    lines += [f"{evaluation.count_note}."] if evaluation.count_note else []
    lines += [_wheels_line(wheels, labels_from), "", *table(["", *(HEADINGS[name] for name in names)], rows)]
    return "\n".join(lines) + "\n"


def unibench_markdown(evaluations: Mapping[str, OpenEvaluation], wheels: EmotionWheels, labels_from: str) -> str:
    """MER-UniBench's nine sets and their mean, beside the published means; in percent."""
    mean, rows, notes = unibench_mean(evaluations), [], []
    for one in UNIBENCH:
        if (found := evaluations.get(one.name)) is None:
            rows.append([one.title, HEADINGS[one.first_metric], "", "", "", "", "", ""])
            continue
        name = one.first_metric
        floor = max(scores[name] for scores in found.floors.values())
        others = [_cell(key, found.scores) for key in ("m_score", "accuracy", "list_length")]
        cells = [_cell(name, found.scores), " to ".join(_percent(end) for end in found.intervals[name])]
        rows.append([one.title, HEADINGS[name], *cells, _percent(floor), *others])
        notes += [f"{found.count_note}."] if found.count_note else []
    headings = ["set", "metric", OURS, "interval", "floor", *(HEADINGS[x] for x in ("m_score", "accuracy"))]
    lines = ["# MER-UniBench", "", *notes, _wheels_line(wheels, labels_from)]
    lines += ["", *table([*headings, HEADINGS["list_length"]], rows), ""]
    missing = [one.title for one in UNIBENCH if one.name not in evaluations]
    said = "" if mean is not None else f"no mean: {', '.join(missing)} missing"
    means = [[f"**{OURS}**", _percent(mean) if mean is not None else said]]
    means += [[who, _percent(value)] for who, value in UNIBENCH_MEANS.items()]
    return "\n".join([*lines, *table(["", "mean of the nine sets"], means)]) + "\n"


def save_open(evaluation: OpenEvaluation, wheels: EmotionWheels, labels_from: str, folder: PathLike) -> None:
    """Write `evaluation.json` and `evaluation.md` into a folder, which is made if needed."""
    write_json(as_path(folder) / "evaluation.json", to_dict(evaluation, wheels, labels_from))
    write_text(as_path(folder) / "evaluation.md", to_markdown(evaluation, wheels, labels_from))


def save_unibench(
    evaluations: Mapping[str, OpenEvaluation], wheels: EmotionWheels, labels_from: str, folder: PathLike
) -> None:
    """Write `unibench.json` and `unibench.md`, and each set's evaluation into a folder in it."""
    folder = as_path(folder)
    for name, evaluation in evaluations.items():
        save_open(evaluation, wheels, labels_from, folder / name)
    sets = {name: to_dict(found, wheels, labels_from) for name, found in evaluations.items()}
    write_json(folder / "unibench.json", {"mean": unibench_mean(evaluations), "sets": sets})
    write_text(folder / "unibench.md", unibench_markdown(evaluations, wheels, labels_from))


def save_synonym_scores(scores: Mapping[str, float], clips: int, folder: PathLike) -> None:
    """Write MER2024-OV's scores, of `synonym_set_scores`, as `evaluation.json` and `evaluation.md`."""
    found = {"benchmark": "mer2024-ov", "clips": clips, "scores": dict(scores)}
    write_json(as_path(folder) / "evaluation.json", found)
    rows = table(["", *(f"set {name}" for name in scores)], [[f"**{OURS}**", *map(_percent, scores.values())]])
    page = ["# MER2024-OV", "", f"{clips} clips; percent.", "", *rows, ""]
    write_text(as_path(folder) / "evaluation.md", "\n".join(page))


def _wheels_line(wheels: EmotionWheels, labels_from: str) -> str:
    return f"Wheels: {wheels.origin}, {wheels.fingerprint}. Labels: {labels_from}."


def _with_interval(evaluation: OpenEvaluation, name: str) -> str:
    interval = evaluation.intervals.get(name)
    value = _cell(name, evaluation.scores)
    return f"{value} ({' to '.join(map(_percent, interval))})" if interval else value


def _cell(name: str, scores: Mapping[str, float]) -> str:
    if name not in scores:
        return ""
    return f"{scores[name]:.2f}" if name == "list_length" else _percent(scores[name])


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"

"""A system's figures on EMER: the judge's, where there is one, and those by words; as JSON and Markdown."""

from collections.abc import Mapping
from typing import Any

from emollama_jax.errors import UserError
from emollama_jax.eval.emer import HEADINGS, PUBLISHED, Progress, clue_overlap, label_overlap
from emollama_jax.eval.judge import Judge
from emollama_jax.eval.lexical import clue_word_overlap, label_hit_rate
from emollama_jax.eval.report import comparison
from emollama_jax.io.atomic import write_json, write_text
from emollama_jax.io.paths import PathLike, as_path
from emollama_jax.text.answers import plain_answer


def evaluate_emer(
    answers: Mapping[str, str | None],
    references: Mapping[str, str],
    labels: Mapping[str, str],
    judge: Judge | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The figures, in JSON's types, over the clips that have an answer and a reference.

    Args:
        answers: by clip; clips with none are counted as `missing`.
        references: what the annotators wrote, by clip.
        labels: the clips' emotions, as far as they are known, for the share of answers that name them.

    Raises:
        UserError: no answer is about a clip with a reference.
    """
    names = [name for name in references if answers.get(name)]
    if not names:
        raise UserError("no answer is about a clip with a reference; check that both name the clips alike")
    given, said = [references[name] for name in names], [plain_answer(answers[name] or "") for name in names]
    labelled = [i for i, name in enumerate(names) if name in labels]
    report: dict[str, Any] = {
        "clips": len(names),
        "missing": len(references) - len(names),
        "clue_word_overlap": clue_word_overlap(given, said),
    }
    if labelled:
        hits = label_hit_rate([labels[names[i]] for i in labelled], [said[i] for i in labelled])
        report |= {"label_hit_rate": hits, "labelled": len(labelled)}
    if judge:
        report |= {"judge": judge.config.model, "overlap": {}}
        for kind, ask in (("clue", clue_overlap), ("label", label_overlap)):
            found = ask(judge, given, said, progress)
            report["overlap"][kind] = {
                "mean": found.mean,
                "statuses": {status: found.count(status) for status in sorted(set(found.statuses))},
                "scores": dict(zip(names, found.scores, strict=True)),
            }
    return report


def to_markdown(report: Mapping[str, Any]) -> str:
    """The page, the judge's figures above the published rows."""
    lines = ["# EMER", "", f"{report['clips']} clips; {report['missing']} more have a reference and no answer."]
    if "overlap" in report:
        means = {kind: found["mean"] for kind, found in report["overlap"].items() if found["mean"] is not None}
        lines += ["", *comparison(HEADINGS, means, PUBLISHED, scale=1.0), ""]
        for kind, found in report["overlap"].items():
            counts = ", ".join(f"{status} {count}" for status, count in found["statuses"].items())
            lines.append(f"{HEADINGS[kind]}, by {report['judge']}: {counts}.")
    lines += ["", f"By words: {100 * report['clue_word_overlap']:.2f} % overlap of content words."]
    if "label_hit_rate" in report:
        rate = 100 * report["label_hit_rate"]
        lines.append(f"Of {report['labelled']} clips with a label {rate:.2f} % of the answers name it.")
    return "\n".join(lines) + "\n"


def save_emer(report: Mapping[str, Any], folder: PathLike) -> None:
    """Writes `emer.json` and `emer.md` into a folder, which is made if needed."""
    write_json(as_path(folder) / "emer.json", report)
    write_text(as_path(folder) / "emer.md", to_markdown(report))

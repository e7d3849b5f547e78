"""Conflict subsets: how well the clips are labelled whose face, voice and words say different things.

    names = find_conflicts(by_view)                # by the model's own labels under A, V and T alone
    rows = evaluate_subsets(by_view, names)

A clip is in conflict where its single views do not all get the same label, or where a list names it.
"""

from collections.abc import Collection, Mapping, Sequence

from emollama_jax.data.tables import key_of
from emollama_jax.errors import UserError
from emollama_jax.eval.benchmarks import Evaluation, evaluate
from emollama_jax.eval.report import HEADINGS, table
from emollama_jax.eval.sweep import Evaluated, with_interval

SINGLE = ("A", "V", "T")
Subsets = dict[str, dict[str, Evaluation]]


def find_conflicts(by_view: Mapping[str, Evaluated]) -> frozenset[str]:
    """Return the names of the clips whose labels under A, V and T are not all the same.

    Raises:
        UserError: one of these views was not evaluated.
    """
    if missing := [view for view in SINGLE if view not in by_view]:
        raise UserError(
            f"conflicts are told by the views A, V and T; evaluate {', '.join(missing)}, too, or give a list"
        )
    clips = zip(*(by_view[view].predictions for view in SINGLE), strict=True)
    return frozenset(of_clip[0].name for of_clip in clips if len({one.label for one in of_clip}) > 1)


def evaluate_subsets(by_view: Mapping[str, Evaluated], names: Collection[str]) -> Subsets:
    """Evaluate the clips in conflict and the others apart, under each view.

    Args:
        names: of the clips in conflict, matched by `key_of`.

    Returns:
        By subset, "conflict" and "agreement", then by view; a subset without labelled clips is left out.
    """
    keys, found = {key_of(name) for name in names}, {}
    for subset, is_in in (("conflict", True), ("agreement", False)):
        for view, evaluated in by_view.items():
            some = [
                one for one in evaluated.predictions if one.emotion is not None and (key_of(one.name) in keys) == is_in
            ]
            if some:
                benchmark = evaluated.evaluation.benchmark
                result = evaluate(benchmark, [one.emotion for one in some], [one.label for one in some])
                found.setdefault(subset, {})[view] = result
    return found


def to_markdown(subsets: Subsets, how: str) -> str:
    """A row for each subset and view; in percent."""
    first = next(evaluation for views in subsets.values() for evaluation in views.values())
    metrics: Sequence[str] = first.benchmark.metrics
    rows = [
        [f"{subset}, {view}", str(evaluation.clips), *(with_interval(evaluation, name) for name in metrics)]
        for subset, views in subsets.items()
        for view, evaluation in views.items()
    ]
    headings = ["", "clips", *(HEADINGS[name] for name in metrics)]
    return "\n".join([f"# Clips in conflict, {how}", "", *table(headings, rows)]) + "\n"

"""The benchmark that a command line names, and one line about a result on it."""

import argparse
from collections.abc import Sequence

from emollama_jax.data.records import Records
from emollama_jax.errors import UserError
from emollama_jax.eval.benchmarks import BENCHMARKS, Benchmark, Evaluation
from emollama_jax.eval.report import HEADINGS

OWN = "labels"


def find_benchmark(arguments: argparse.Namespace, splits: Sequence[Records]) -> Benchmark:
    """The benchmark, or one of the labels given (`add_label_arguments`) or of the data. Raises UserError."""
    if arguments.benchmark != OWN:
        for name in ("labels", "label_numbers"):
            if getattr(arguments, name) is not None:
                option = name.replace("_", "-")
                raise UserError(f"--{option}: {arguments.benchmark} has its own; write {OWN} for others")
        return BENCHMARKS[arguments.benchmark]
    if not (labels := arguments.labels or (splits and tuple(splits[0].metadata["labels"]))):
        raise UserError("--labels: give the labels, separated by commas")
    try:
        return Benchmark(name=OWN, title="Labels", labels=labels, first_number=arguments.label_numbers)
    except ValueError as error:
        raise UserError(f"--{error}") from error


def scores_line(evaluation: Evaluation) -> str:
    """The benchmark's metrics with their intervals."""
    shown = []
    for name in evaluation.benchmark.metrics:
        low, high = evaluation.intervals[name]
        value = evaluation.scores[name]
        shown.append(f"{HEADINGS[name]} {100 * value:.2f} % ({100 * low:.2f} to {100 * high:.2f})")
    return ", ".join(shown)


def floor_line(evaluation: Evaluation) -> str:
    """What the best constant answer scores."""
    label, floor = evaluation.floor
    shown = (f"{HEADINGS[name]} {100 * floor[name]:.2f} %" for name in evaluation.benchmark.metrics)
    return f"floor, always {label!r}: {', '.join(shown)}"

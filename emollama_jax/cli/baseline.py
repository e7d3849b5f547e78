"""Train small heads on stored features, each alone and all together."""

import argparse
import time

import numpy as np
from etils import epath

from emollama_jax.cli._arguments import VerbParser, add_label_arguments, at_least
from emollama_jax.cli._benchmark import OWN, find_benchmark, floor_line, scores_line
from emollama_jax.data.records import Records, open_split
from emollama_jax.errors import UserError
from emollama_jax.eval.baseline import HEADS, HeadSettings, choose_inputs, fit_head, read_inputs
from emollama_jax.eval.baseline_report import BaselineRow, save_baselines
from emollama_jax.eval.benchmarks import BENCHMARKS, Benchmark, evaluate
from emollama_jax.eval.sweep import check_labels


def run(argv: list[str]) -> int:
    arguments = make_parser().parse_args(argv)
    train, test = open_split(arguments.train, "--train: "), open_split(arguments.data, "--data: ")
    if arguments.train == arguments.data:
        raise UserError("--train and --data are the same clips; evaluate on others")
    benchmark = find_benchmark(arguments, [train])
    for records in (train, test):
        check_labels(records, benchmark)
    inputs, others = read_inputs(train), read_inputs(test)
    numbers, truth = _numbers(train, benchmark), _numbers(test, benchmark)
    labelled, evaluated = np.flatnonzero(numbers >= 0), np.flatnonzero(truth >= 0)
    inputs = {name: values[labelled] for name, values in inputs.items()}
    others = {name: others[name][evaluated] for name in inputs if name in others}
    true, rows = [benchmark.labels[i] for i in truth[evaluated]], []
    for what, names in choose_inputs(inputs).items():
        if missing := set(names) - set(others):
            raise UserError(f"{arguments.data} has no {', '.join(sorted(missing))}; prepare it as the training clips")
        start, found, losses = time.monotonic(), [], []
        for seed in range(arguments.seeds):
            settings = HeadSettings(head=arguments.head, steps=arguments.steps, seed=seed)
            head = fit_head(inputs, benchmark.labels, numbers[labelled], names=names, settings=settings)
            found.append(evaluate(benchmark, true, head.predict(others)))
            log_probabilities = head.log_probabilities(others)
            losses.append(-float(log_probabilities[range(len(true)), truth[evaluated]].mean()))
        rows.append(BaselineRow(what, names, tuple(found), tuple(losses)))
        loss, seconds = f"label loss {np.mean(losses):.2f} nats", f"{time.monotonic() - start:.1f} s"
        print(f"{what:<9} {scores_line(found[0])}, {loss}; {seconds}", flush=True)
    print(floor_line(rows[0].evaluations[0]))
    save_baselines(rows, arguments.head, arguments.out)
    print(f"wrote {arguments.out}")
    return 0


def _numbers(records: Records, benchmark: Benchmark) -> np.ndarray:
    """The place of each clip's label among the benchmark's; -1 where it has none."""
    found = [benchmark.label(label) for label in records.metadata["labels"]]
    places = [-1 if label is None else benchmark.labels.index(label) for label in found]
    emotions = records.metadata["answers"][records.split]["emotion"]
    return np.array([places[index] if index >= 0 else -1 for index in emotions], np.int32)


def make_parser() -> argparse.ArgumentParser:
    parser = VerbParser(
        prog="emollama baseline",
        description="Trains a head on the stored features of prepared clips, without a language model: each feature "
        "alone (mae: face, videomae: motion, hubert: voice, frame: image tokens, words: the subtitle's), audio, video "
        "and text, and all together. So the features can be checked in minutes on a CPU before anything is trained on "
        "them. The published rows stand beside.",
        epilog="example: emollama baseline mer2023 --train data/mer2023/frame/1.0.0:train "
        "--data data/mer2023/frame/1.0.0:test1 --out results",
    )
    parser.add_argument("benchmark", choices=(*BENCHMARKS, OWN), help=f"{OWN}: any labels")
    parser.add_argument("--train", required=True, metavar="FOLDER:SPLIT", help="prepared clips to train on")
    parser.add_argument("--data", required=True, metavar="FOLDER:SPLIT", help="prepared clips to evaluate on")
    parser.add_argument("--out", type=epath.Path, required=True, metavar="FOLDER", help="the results")
    add_label_arguments(parser, f"of {OWN}; default: those of the data")
    group = parser.add_argument_group("the heads")
    group.add_argument(
        "--head", choices=HEADS, default=HeadSettings().head, help="one layer or two (default: %(default)s)"
    )
    group.add_argument(
        "--steps", type=at_least(1), default=HeadSettings().steps, metavar="N", help="default: %(default)s"
    )
    group.add_argument("--seeds", type=at_least(1), default=3, metavar="N", help="heads a row (default: %(default)s)")
    return parser

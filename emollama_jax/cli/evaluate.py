"""Evaluate a model, or answers in a file, on a benchmark."""

import argparse
import dataclasses
from collections.abc import Sequence

from etils import epath

from emollama_jax.cli._arguments import VerbParser, add_label_arguments, at_least, parse
from emollama_jax.cli._evaluate_open import OPEN_NAMES, add_open_arguments, evaluate_open_sets
from emollama_jax.cli._model import add_model_arguments, inputs_of_records, model_options, read_experiment
from emollama_jax.cli._progress import Progress
from emollama_jax.config import Config
from emollama_jax.data.datasets import open_datasets
from emollama_jax.data.modalities import ALL, check_modalities
from emollama_jax.data.records import Records, open_split
from emollama_jax.errors import UserError
from emollama_jax.eval.answer_files import evaluate_answers, labels_of_records, read_answers, read_labels
from emollama_jax.eval.benchmarks import BENCHMARKS, Benchmark, Evaluation
from emollama_jax.eval.metrics import INVALID
from emollama_jax.eval.report import HEADINGS
from emollama_jax.eval.sweep import WAYS, Cell, save_sweep, sweep
from emollama_jax.infer.engine import Engine
from emollama_jax.io.paths import local_path

OWN = "labels"


def run(argv: list[str]) -> int:
    if argv[:1] == ["emer"]:
        raise UserError("emer is a verb of its own: emollama judge ANSWERS REFERENCES --out FOLDER")
    if argv and argv[0] in OPEN_NAMES:
        _, arguments = parse(make_parser(), argv, default=Config())
        evaluate_open_sets(arguments)
        print(f"wrote {arguments.out}")
        return 0
    config, arguments = read_experiment(make_parser(), argv)
    if arguments.predictions and arguments.trained:
        raise UserError("--trained: answers in a file (--predictions) are not a model's; give one of the two")
    if arguments.list and not arguments.predictions:
        raise UserError("--list: goes with --predictions, and only there")
    (_evaluate_file if arguments.predictions else _evaluate_model)(config, arguments)
    print(f"wrote {arguments.out}")
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = VerbParser(
        prog="emollama evaluate",
        usage="emollama evaluate BENCHMARK --data FOLDER:SPLIT --trained RUN [--modalities AVT,A,V,T] --out FOLDER\n"
        "       emollama evaluate BENCHMARK --predictions FILE [--data FOLDER:SPLIT | --list FILE] --out FOLDER\n"
        "       emollama evaluate {ov-merd,mer-fg,open,mer2024-ov,unibench} --predictions FILE --list FILE "
        "--wheels FOLDER --out FOLDER",
        description="Scores the labels of prepared clips and writes metrics with their confidence intervals, classes "
        "and the confusion matrix, beside the published figures (JSON, Markdown, PNG). Several sets of modalities, and "
        "data sets prepared by several frame rules, are evaluated one by one and put into one table. --predictions "
        "evaluates answers in a file instead: those of emollama predict, or of any other system.",
        epilog="example: emollama evaluate mer2023 --data data/mer2023/frame/1.0.0:test1 --trained runs/mer2023 "
        "--modalities AVT,AV,A,V,T --out results",
    )
    parser.add_argument("benchmark", choices=(*BENCHMARKS, OWN, *OPEN_NAMES), help=f"{OWN}: any labels")
    parser.add_argument("--out", type=epath.Path, required=True, metavar="FOLDER", help="the results")
    parser.add_argument(
        "--data", action="append", default=[], metavar="FOLDER:SPLIT", help="prepared clips; one for each frame rule"
    )
    add_label_arguments(parser, f"of {OWN}; default: those of the data")
    parser.add_argument(
        "--invalid", choices=INVALID, default=INVALID[0], help="what such answers count as (default: %(default)s)"
    )
    group = parser.add_argument_group("how a model is asked")
    group.add_argument("--modalities", default=ALL, help="sets of A, V and T, as in AVT,AV,A (default: %(default)s)")
    group.add_argument(
        "--orders", type=at_least(1), default=1, metavar="N", help="of the labels, to see how much depends on them"
    )
    group.add_argument("--by", choices=WAYS, default=WAYS[0], help="score labels or generate answers (default: score)")
    group.add_argument("--batch-size", type=at_least(1), default=16, metavar="N", help="clips (default: %(default)s)")
    add_model_arguments(parser)
    group = parser.add_argument_group("answers in a file")
    group.add_argument("--predictions", type=local_path, metavar="FILE", help="a table or .jsonl of name and answer")
    group.add_argument(
        "--list", type=local_path, metavar="FILE", help="names and labels, where the answers' file has none"
    )
    add_open_arguments(parser)
    return parser


def _evaluate_model(config: Config, arguments: argparse.Namespace) -> None:
    modalities = [check_modalities(some) for some in arguments.modalities.split(",")]
    if len(set(modalities)) < len(modalities):
        raise UserError(f"--modalities {arguments.modalities}: give each set once")
    datasets = open_datasets(arguments.data or config.data.eval, config, "--data")
    splits = [dataset.records for dataset in datasets]
    benchmark, inputs = _benchmark(arguments, splits), inputs_of_records(arguments, datasets)
    config = dataclasses.replace(config, prompt=dataclasses.replace(config.prompt, labels=benchmark.labels))
    engine = Engine.load(config=config, inputs=inputs, slots=arguments.batch_size, **model_options(arguments))
    passes = len(modalities) * (arguments.orders if arguments.by == "generate" else 1)
    progress = Progress(sum(map(len, splits)) * passes, "clip")
    settings = {name: getattr(arguments, name) for name in ("orders", "by", "batch_size", "invalid")}
    cells = sweep(engine, splits, benchmark, modalities=modalities, progress=progress, **settings)
    progress.close()
    save_sweep(cells, arguments.out)
    for cell in cells:
        print(_line(cell))
    print(_floor(cells[0].evaluated.evaluation))


def _benchmark(arguments: argparse.Namespace, splits: list[Records]) -> Benchmark:
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


def _line(cell: Cell) -> str:
    evaluation, unlabelled = cell.evaluated.evaluation, cell.evaluated.unlabelled
    shown = []
    for name in evaluation.benchmark.metrics:
        low, high = evaluation.intervals[name]
        value = evaluation.scores[name]
        shown.append(f"{HEADINGS[name]} {100 * value:.2f} % ({100 * low:.2f} to {100 * high:.2f})")
    if evaluation.sensitivity:
        shown.append(f"spread by label order {100 * evaluation.sensitivity['spread']:.2f}")
    left_out = f", {unlabelled} without a label left out" if unlabelled else ""
    return f"{cell.modalities}, {cell.frame} frame: {', '.join(shown)}; {_counts(evaluation, left_out)}"


def _floor(evaluation: Evaluation) -> str:
    label, floor = evaluation.floor
    shown = (f"{HEADINGS[name]} {100 * floor[name]:.2f} %" for name in evaluation.benchmark.metrics)
    return f"floor, always {label!r}: {', '.join(shown)}"


def _counts(evaluation: Evaluation, left_out: str = "") -> str:
    return f"{evaluation.clips} clips{left_out}, {evaluation.invalid} invalid answers"


def _evaluate_file(config: Config, arguments: argparse.Namespace) -> None:
    """Evaluates answers in a file, by labels in records, in a list or beside the answers."""
    splits = [open_split(path) for path in arguments.data]
    others = ("emotion", "caption_fine") if arguments.list or splits else ("caption_fine",)
    answers = read_answers(arguments.predictions, ("answer", *others))
    if arguments.list:
        truth = read_labels(arguments.list)
    else:
        truth = labels_of_records(splits) if splits else answers.emotions
    if not truth:
        raise UserError(f"no labels beside the answers in {arguments.predictions}; give --data or --list")
    valences = read_labels(arguments.list, "valence", none_needed=True) if arguments.list and answers.valences else {}
    benchmark = _benchmark(arguments, splits)
    matched = evaluate_answers(answers, truth, benchmark, invalid=arguments.invalid, valences=valences)
    matched.evaluated.save(arguments.out)
    evaluation = matched.evaluated.evaluation
    shown = (f"{HEADINGS[name]} {100 * evaluation.scores[name]:.2f} %" for name in evaluation.benchmark.metrics)
    print(f"{', '.join(shown)}; {_counts(evaluation)}")
    print(_floor(evaluation))
    if found := evaluation.valence:
        combined = f"MER2023's combined ranking {100 * found['combined']:.2f} %"
        print(f"valence: mean squared error {found['mse']:.4f}; {combined}")
    _name(matched.missing, "clips without an answer, counted as invalid")
    _name(matched.others, "answers about other clips, left out")


def _name(clips: Sequence[str], what: str) -> None:
    if clips:
        print(f"{len(clips)} {what}: {', '.join(clips[:3])}{', ...' if len(clips) > 3 else ''}")

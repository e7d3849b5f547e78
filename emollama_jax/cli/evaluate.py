"""Judge a model, or answers that are there, by a benchmark."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from emollama_jax.cli._arguments import at_least
from emollama_jax.cli._model import (
    add_model_arguments,
    image_encoder_of,
    load_model,
    mesh_of,
    on_devices,
    read_experiment,
)
from emollama_jax.cli._progress import Progress
from emollama_jax.data.datasets import find_encoders, find_images, open_datasets
from emollama_jax.data.records import Records
from emollama_jax.errors import UserError
from emollama_jax.eval.answer_files import evaluate_answers, labels_of_records, read_answers, read_labels
from emollama_jax.eval.benchmarks import BENCHMARKS, Benchmark
from emollama_jax.eval.emer_report import evaluate_emer, save_emer, to_markdown
from emollama_jax.eval.judge import Judge
from emollama_jax.eval.metrics import INVALID
from emollama_jax.eval.report import HEADINGS
from emollama_jax.eval.sweep import WAYS, Cell, save_sweep, sweep
from emollama_jax.infer.predictor import ALL, check_modalities
from emollama_jax.io.chat import ChatConfig

OWN, EMER = "labels", "emer"


def run(argv: list[str]) -> int:
    parser = _parser()
    if {"-h", "--help"} & set(argv):
        parser.parse_args(argv)
    if any(argument.partition("=")[0] == "--predictions" for argument in argv):
        arguments = parser.parse_args(argv)
        return _emer(arguments) if arguments.benchmark == EMER else _of_file(arguments)
    return _of_model(parser, argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="emollama evaluate",
        usage="emollama evaluate BENCHMARK --data FOLDER:SPLIT --trained RUN [--modalities AVT,A,V,T] --out FOLDER\n"
        "       emollama evaluate BENCHMARK --predictions FILE [--data FOLDER:SPLIT | --list FILE] --out FOLDER\n"
        "       emollama evaluate emer --predictions FILE --references FILE [--judge] --out FOLDER",
        description="Scores the labels of prepared clips and writes metrics with their confidence intervals, classes "
        "and the confusion matrix, beside the published figures (JSON, Markdown, PNG). Several sets of modalities, and "
        "data sets prepared by several frame rules, are evaluated one by one and put into one table. --predictions "
        "judges answers in a file instead: those of emollama predict, or of any other system.",
        epilog="example: emollama evaluate mer2023 --data data/mer2023/frame/1.0.0:test1 --trained runs/mer2023 "
        "--modalities AVT,AV,A,V,T --out results",
    )
    parser.add_argument("benchmark", choices=(*BENCHMARKS, OWN, EMER), help=f"{OWN}: any labels")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the results")
    parser.add_argument(
        "--data", action="append", default=[], metavar="FOLDER:SPLIT", help="prepared clips; one for each frame rule"
    )
    parser.add_argument("--labels", help=f"of {OWN}, separated by commas (default: those of the data)")
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
    group = parser.add_argument_group("answers in files")
    group.add_argument("--predictions", type=Path, metavar="FILE", help=".csv or .jsonl of name and answer")
    group.add_argument("--list", type=Path, metavar="FILE", help="names and labels, where the answers' file has none")
    group.add_argument(
        "--references", metavar="FILE", help="of EMER: a table of names and descriptions, or FOLDER:SPLIT"
    )
    group.add_argument(
        "--judge", action="store_true", help="ask the model at EMOLLAMA_JUDGE_ADDRESS (and _MODEL, _KEY) for overlaps"
    )
    group.add_argument(
        "--judge-cache", type=Path, metavar="FOLDER", help="its answers, which are asked for once (default: OUT/judge)"
    )
    return parser


def _of_model(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    if EMER in argv[:1]:
        raise UserError("emer: judges answers in a file; give --predictions, made by emollama predict --task reason")
    config, arguments, trained = read_experiment(parser, argv)
    modalities = [check_modalities(some) for some in arguments.modalities.split(",")]
    if len(set(modalities)) < len(modalities):
        raise UserError(f"--modalities {arguments.modalities}: give each set once")
    paths = arguments.data or config.data.eval
    datasets = open_datasets(paths, config, "--data")
    splits = [source.records for source in datasets]
    benchmark = _benchmark(arguments, splits)
    if trained and not arguments.any_encoders:
        trained.check_encoders(find_encoders(datasets))
    files = image_encoder_of(config, arguments, trained) if find_images(datasets) == "frames" else {}
    mesh = mesh_of(config)
    with on_devices(config, mesh):
        model, tokenizer = load_model(config, arguments, trained, mesh, files=files)
        progress = Progress(sum(map(len, splits)) * len(modalities), "clip")
        cells = sweep(
            model,
            tokenizer,
            config,
            splits,
            benchmark,
            modalities=modalities,
            orders=arguments.orders,
            by=arguments.by,
            batch_size=arguments.batch_size,
            invalid=arguments.invalid,
            progress=progress,
        )
        progress.close()
    save_sweep(cells, arguments.out)
    for cell in cells:
        print(_line(cell))
    print(f"wrote {arguments.out}")
    return 0


def _benchmark(arguments: argparse.Namespace, splits: list[Records]) -> Benchmark:
    if arguments.benchmark != OWN:
        if arguments.labels:
            raise UserError(f"--labels: {arguments.benchmark} has its own; write {OWN} for others")
        return BENCHMARKS[arguments.benchmark]
    if arguments.labels:
        labels = tuple(label.strip() for label in arguments.labels.split(","))
    elif splits:
        labels = tuple(splits[0].metadata["labels"])
    else:
        raise UserError("--labels: give the labels, separated by commas")
    try:
        return Benchmark(name=OWN, title="Labels", labels=labels)
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
    return f"{cell.modalities}, {cell.frame} frame: {', '.join(shown)}; {evaluation.clips} clips{left_out}"


def _of_file(arguments: argparse.Namespace) -> int:
    """Answers in a file against labels in records, in a list or beside the answers."""
    answers = read_answers(arguments.predictions)
    splits = [_records(path) for path in arguments.data]
    if arguments.list:
        truth = read_labels(arguments.list)
    elif splits:
        truth = {key: label for records in splits for key, label in labels_of_records(records).items()}
    else:
        truth = answers.emotions
    if not truth:
        raise UserError(f"no labels beside the answers in {arguments.predictions}; give --data or --list")
    matched = evaluate_answers(answers, truth, _benchmark(arguments, splits), invalid=arguments.invalid)
    matched.evaluated.save(arguments.out)
    scores = matched.evaluated.evaluation.scores
    print(", ".join(f"{HEADINGS[n]} {100 * scores[n]:.2f} %" for n in matched.evaluated.evaluation.benchmark.metrics))
    _name(matched.missing, "clips without an answer, counted as invalid")
    _name(matched.others, "answers about other clips, left out")
    print(f"wrote {arguments.out}")
    return 0


def _name(clips: Sequence[str], what: str) -> None:
    if clips:
        print(f"{len(clips)} {what}: {', '.join(clips[:3])}{', ...' if len(clips) > 3 else ''}")


def _records(path: str) -> Records:
    folder, found, split = path.rpartition(":")
    if not found:
        raise UserError(f"{path!r} names no split; write FOLDER:SPLIT")
    return Records(folder, split)


def _emer(arguments: argparse.Namespace) -> int:
    if not arguments.references:
        raise UserError("--references: give the annotators' descriptions, a table or FOLDER:SPLIT")
    if ":" in arguments.references and not Path(arguments.references).exists():
        records = _records(arguments.references)
        references, labels = labels_of_records(records, "caption_fine"), labels_of_records(records)
    else:
        references, labels = read_labels(Path(arguments.references), "caption_fine"), {}
    if arguments.list:
        labels = read_labels(arguments.list)
    cache = arguments.judge_cache or arguments.out / "judge"
    judge = Judge(ChatConfig.from_environment("judge"), cache) if arguments.judge else None
    report = evaluate_emer(read_answers(arguments.predictions).answers, references, labels, judge)
    save_emer(report, arguments.out)
    print(to_markdown(report), end="")
    print(f"wrote {arguments.out}")
    return 0

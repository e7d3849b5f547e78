"""Evaluate a model, or answers in a file, on a benchmark."""

import argparse
import dataclasses
from collections.abc import Sequence

from etils import epath

from emollama_jax.cli._arguments import VerbParser, add_label_arguments, at_least, parse
from emollama_jax.cli._benchmark import OWN, find_benchmark, floor_line, scores_line
from emollama_jax.cli._evaluate_open import OPEN_NAMES, add_open_arguments, evaluate_open_sets
from emollama_jax.cli._model import add_model_arguments, inputs_of_records, model_options, read_experiment
from emollama_jax.cli._progress import Progress
from emollama_jax.config import Config
from emollama_jax.data.datasets import open_datasets
from emollama_jax.data.modalities import ALL, VIEWS, check_modalities
from emollama_jax.data.records import open_split
from emollama_jax.errors import UserError
from emollama_jax.eval.answer_files import evaluate_answers, labels_of_records, read_answers, read_labels, read_names
from emollama_jax.eval.benchmarks import BENCHMARKS, Evaluation
from emollama_jax.eval.conflicts import evaluate_subsets, find_conflicts, to_markdown
from emollama_jax.eval.forgetting import find_stages, find_validation_splits, measure_forgetting, save_forgetting
from emollama_jax.eval.metrics import INVALID
from emollama_jax.eval.report import HEADINGS, to_dict
from emollama_jax.eval.runs_report import EvaluatedRun, save_runs
from emollama_jax.eval.selection import check_unseen, find_selection
from emollama_jax.eval.sweep import LABEL_ORDERS, WAYS, Cell, save_sweep, sweep
from emollama_jax.infer.engine import Engine
from emollama_jax.io.atomic import write_json, write_text
from emollama_jax.io.paths import local_path
from emollama_jax.runs.run import Run

FORGETTING = "forgetting"


def run(argv: list[str]) -> int:
    if argv[:1] == ["emer"]:
        raise UserError("emer is a verb of its own: emollama judge ANSWERS REFERENCES --out FOLDER")
    if argv and argv[0] in OPEN_NAMES:
        _, arguments = parse(make_parser(), argv, default=Config())
        evaluate_open_sets(arguments)
        print(f"wrote {arguments.out}")
        return 0
    if argv[:1] == [FORGETTING]:
        _evaluate_forgetting(parse(make_parser(), argv, default=Config())[1])
        return 0
    if {"--runs", "--against"} & {word.partition("=")[0] for word in argv}:
        arguments = parse(make_parser(), argv, default=Config())[1]
        if not arguments.runs or arguments.trained or arguments.predictions:
            raise UserError("--runs: give one run or more, without --trained and --predictions")
        _evaluate_runs(argv, arguments)
        print(f"wrote {arguments.out}")
        return 0
    config, arguments = read_experiment(make_parser(), argv)
    if arguments.predictions and arguments.trained:
        raise UserError("--trained: answers in a file (--predictions) are not a model's; give one of the two")
    if arguments.conflicts is not None and arguments.predictions:
        raise UserError("--conflicts: views are a model's; give --trained in place of --predictions")
    if arguments.run:
        raise UserError(f"{arguments.run[0]}: goes with {FORGETTING}, and only there; give a model with --trained")
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
        "--wheels FOLDER --out FOLDER\n"
        f"       emollama evaluate {FORGETTING} RUN [--data FOLDER:SPLIT] --out FOLDER",
        description="Scores the labels of prepared clips and writes metrics with their confidence intervals, classes "
        "and the confusion matrix, beside the published figures (JSON, Markdown, PNG). Several sets of modalities, and "
        "data sets prepared by several frame rules, are evaluated one by one and put into one table. --predictions "
        "evaluates answers in a file instead: those of emollama predict, or of any other system.",
        epilog="example: emollama evaluate mer2023 --data data/mer2023/frame/1.0.0:test1 --trained runs/mer2023 "
        "--modalities AVT,AV,A,V,T --out results",
    )
    parser.add_argument("benchmark", choices=(*BENCHMARKS, OWN, *OPEN_NAMES, FORGETTING), help=f"{OWN}: any labels")
    parser.add_argument("run", nargs="*", help=f"of {FORGETTING}: the last stage's, or those of all stages in order")
    parser.add_argument("--out", type=epath.Path, required=True, metavar="FOLDER", help="the results")
    parser.add_argument(
        "--data", action="append", default=[], metavar="FOLDER:SPLIT", help="prepared clips; one for each frame rule"
    )
    add_label_arguments(parser, f"of {OWN}; default: those of the data")
    parser.add_argument(
        "--invalid", choices=INVALID, default=INVALID[0], help="what such answers count as (default: %(default)s)"
    )
    group = parser.add_argument_group("how a model is asked")
    group.add_argument(
        "--modalities", default=ALL, help="sets of A, V and T, as in AVT,AV,A; all: all seven (default: %(default)s)"
    )
    group.add_argument(
        "--orders", type=at_least(1), default=1, metavar="N", help="of the labels, to see how much depends on them"
    )
    group.add_argument(
        "--label-orders",
        default=LABEL_ORDERS[0],
        metavar="ORDERS",
        help=f"of the labels in the question, a row each: any of {','.join(LABEL_ORDERS)} (default: %(default)s)",
    )
    group.add_argument(
        "--conflicts",
        nargs="?",
        const="",
        metavar="FILE",
        help="clips whose views disagree apart: those of a list, or by the model's labels under A, V and T alone",
    )
    group.add_argument("--by", choices=WAYS, default=WAYS[0], help="score labels or generate answers (default: score)")
    group.add_argument("--batch-size", type=at_least(1), default=16, metavar="N", help="clips (default: %(default)s)")
    add_model_arguments(parser)
    group = parser.add_argument_group("several runs")
    group.add_argument("--runs", nargs="+", default=[], metavar="RUN", help="of several seeds, as a rule")
    group.add_argument("--against", nargs="+", default=[], metavar="RUN", help="those of another system, to compare")
    group = parser.add_argument_group("answers in a file")
    group.add_argument("--predictions", type=local_path, metavar="FILE", help="a table or .jsonl of name and answer")
    group.add_argument(
        "--list", type=local_path, metavar="FILE", help="names and labels, where the answers' file has none"
    )
    add_open_arguments(parser)
    return parser


def _evaluate_model(config: Config, arguments: argparse.Namespace) -> None:
    cells, selection = _evaluate_cells(config, arguments)
    save_sweep(cells, arguments.out)
    for cell in cells:
        print(_line(cell))
    print(floor_line(cells[0].evaluated.evaluation))
    if arguments.by == "score":
        print(_cost(cells))
    if selection:
        print(f"checkpoint: {selection}")
    if arguments.conflicts is not None:
        _save_conflicts(cells, arguments)


def _evaluate_forgetting(arguments: argparse.Namespace) -> None:
    if not arguments.run:
        raise UserError(f"{FORGETTING}: give the last stage's run, or the runs of all stages in their order")
    runs = [Run.open(path) for path in arguments.run]
    stages = runs if len(runs) > 1 else find_stages(*runs)
    splits = arguments.data or find_validation_splits(stages)
    log = lambda line: print(line, flush=True)
    rows = measure_forgetting(stages, splits, batch_size=arguments.batch_size, log=log)
    print(save_forgetting(rows, arguments.out), end="")
    print(f"wrote {arguments.out}")


def _evaluate_runs(argv: list[str], arguments: argparse.Namespace) -> None:
    """Evaluates several runs, each by its own experiment, and compares them."""
    found: dict[str, list[EvaluatedRun]] = {"runs": [], "against": []}
    given = [*(("runs", path) for path in arguments.runs), *(("against", path) for path in arguments.against)]
    for number, (kind, path) in enumerate(given):
        config, of_run = read_experiment(make_parser(), [*argv, "--trained", path])
        cells, selection = _evaluate_cells(config, of_run)
        save_sweep(cells, arguments.out / f"{number + 1}-{path.strip('/').rpartition('/')[2]}")
        found[kind].append(EvaluatedRun(path, selection, tuple(cells)))
        print(f"{path} ({selection})")
        for cell in cells:
            print(f"  {_line(cell)}")
    print(save_runs(found["runs"], found["against"], arguments.out), end="")


def _evaluate_cells(config: Config, arguments: argparse.Namespace) -> tuple[list[Cell], str]:
    """Evaluates a model on each split and set of modalities; returns how its checkpoint was chosen, too."""
    asked = ",".join(VIEWS) if arguments.modalities == "all" else arguments.modalities
    modalities = [check_modalities(some) for some in asked.split(",")]
    label_orders = arguments.label_orders.split(",")
    if unknown := [order for order in label_orders if order not in LABEL_ORDERS]:
        raise UserError(f"--label-orders {unknown[0]!r}: give any of {', '.join(LABEL_ORDERS)}")
    if arguments.conflicts == "" and not set("AVT") <= set(modalities):
        raise UserError("--conflicts: needs --modalities with A, V and T each alone, or a list of clips")
    if len(set(modalities)) < len(modalities):
        raise UserError(f"--modalities {arguments.modalities}: give each set once")
    datasets = open_datasets(arguments.data or config.data.eval, config, "--data")
    splits = [dataset.records for dataset in datasets]
    benchmark, inputs = find_benchmark(arguments, splits), inputs_of_records(arguments, datasets)
    selection = ""
    if isinstance(arguments.trained, Run):
        chosen = find_selection(arguments.trained)
        check_unseen(arguments.trained, chosen, splits)
        selection = chosen.text
    config = dataclasses.replace(config, prompt=dataclasses.replace(config.prompt, labels=benchmark.labels))
    engine = Engine.load(config=config, inputs=inputs, slots=arguments.batch_size, **model_options(arguments))
    passes = len(modalities) * len(label_orders) * (arguments.orders if arguments.by == "generate" else 1)
    progress = Progress(sum(map(len, splits)) * passes, "clip")
    settings = {name: getattr(arguments, name) for name in ("orders", "by", "batch_size", "invalid")}
    settings |= {"modalities": modalities, "label_orders": label_orders, "progress": progress}
    cells = sweep(engine, splits, benchmark, **settings)
    progress.close()
    return [cell.with_checkpoint(selection) for cell in cells], selection


def _save_conflicts(cells: list[Cell], arguments: argparse.Namespace) -> None:
    """Evaluates clips whose views disagree, and the others, apart, for each frame rule."""
    how = f"as listed in {arguments.conflicts}" if arguments.conflicts else "by the labels of A, V and T"
    for frame in dict.fromkeys(cell.frame for cell in cells):
        chosen = [cell for cell in cells if cell.frame == frame and cell.label_order == cells[0].label_order]
        by_view = {cell.modalities: cell.evaluated for cell in chosen}
        listed = arguments.conflicts and read_names(local_path(arguments.conflicts))
        subsets = evaluate_subsets(by_view, listed or find_conflicts(by_view))
        page = to_markdown(subsets, f"{how}, {frame} frame")
        rows = {subset: {v: to_dict(one) for v, one in views.items()} for subset, views in subsets.items()}
        write_json(arguments.out / f"conflicts-{frame}.json", rows)
        write_text(arguments.out / f"conflicts-{frame}.md", page)
        print(page, end="")


def _line(cell: Cell) -> str:
    evaluation, unlabelled = cell.evaluated.evaluation, cell.evaluated.unlabelled
    shown = [scores_line(evaluation)]
    if evaluation.sensitivity:
        shown.append(f"spread by label order {100 * evaluation.sensitivity['spread']:.2f}")
    left_out = f", {unlabelled} without a label left out" if unlabelled else ""
    return f"{cell.title}: {', '.join(shown)}; {_counts(evaluation, left_out)}"


def _cost(cells: Sequence[Cell]) -> str:
    """What was read, and how long it took, a clip and whole."""
    tokens, seconds = (sum(getattr(cell.evaluated, name) for cell in cells) for name in ("tokens", "seconds"))
    clips = len(cells[0].evaluated.predictions)
    rows = f"{len(cells)} rows" if len(cells) > 1 else "1 row"
    return f"labels scored for {rows}: {tokens / clips:.1f} tokens a clip, {seconds:.1f} s"


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
    benchmark = find_benchmark(arguments, splits)
    matched = evaluate_answers(answers, truth, benchmark, invalid=arguments.invalid, valences=valences)
    matched.evaluated.save(arguments.out)
    evaluation = matched.evaluated.evaluation
    shown = (f"{HEADINGS[name]} {100 * evaluation.scores[name]:.2f} %" for name in evaluation.benchmark.metrics)
    print(f"{', '.join(shown)}; {_counts(evaluation)}")
    print(floor_line(evaluation))
    if found := evaluation.valence:
        combined = f"MER2023's combined ranking {100 * found['combined']:.2f} %"
        print(f"valence: mean squared error {found['mse']:.4f}; {combined}")
    _name(matched.missing, "clips without an answer, counted as invalid")
    _name(matched.others, "answers about other clips, left out")


def _name(clips: Sequence[str], what: str) -> None:
    if clips:
        print(f"{len(clips)} {what}: {', '.join(clips[:3])}{', ...' if len(clips) > 3 else ''}")

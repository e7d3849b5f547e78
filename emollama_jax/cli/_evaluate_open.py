"""`emollama evaluate` for labels of an open vocabulary: MER-UniBench, MER2025's tracks and MER2024-OV."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from emollama_jax.cli._progress import Progress
from emollama_jax.errors import UserError
from emollama_jax.eval.judge import Judge
from emollama_jax.eval.label_extraction import Extracted, extract_by_judge, extract_by_likelihood, extract_by_words
from emollama_jax.eval.label_files import (
    read_descriptions,
    read_label_sets,
    read_sentiments,
    read_synonyms,
    write_label_sets,
)
from emollama_jax.eval.open_report import save_open, save_synonym_scores, save_unibench
from emollama_jax.eval.open_vocabulary import synonym_set_scores
from emollama_jax.eval.unibench import (
    HEADINGS,
    OPEN_SETS,
    UNIBENCH,
    OpenEvaluation,
    OpenSet,
    evaluate_open,
    unibench_mean,
)
from emollama_jax.eval.wheels import EmotionWheels
from emollama_jax.infer.loading import load_run
from emollama_jax.io.chat import ChatConfig
from emollama_jax.io.paths import local_path
from emollama_jax.runs.run import Run

EXTRACT = ("chat", "likelihood", "words")
UNIBENCH_NAME, SYNONYMS_NAME = "unibench", "mer2024-ov"
OPEN_NAMES = (*OPEN_SETS, SYNONYMS_NAME, UNIBENCH_NAME)
SUFFIXES = ("-openset.npz", ".npz", ".csv", ".jsonl", ".json", ".xlsx", ".txt")  # the first that is there counts


def add_open_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("labels of an open vocabulary")
    group.add_argument(
        "--wheels", type=local_path, metavar="FOLDER", help="the scorer's emotion_wheel, or its wheel_mapping.npz"
    )
    group.add_argument(
        "--extract",
        choices=EXTRACT,
        help="how labels are taken from descriptions: by a chat model (EMOLLAMA_JUDGE_ADDRESS, _MODEL, _KEY), by the "
        "likelihood of the wheels' words under --trained, or as words in the text (for smoke runs)",
    )
    group.add_argument("--synonyms", type=local_path, metavar="FOLDER", help=f"of {SYNONYMS_NAME}: a .npy a clip")


def evaluate_open_sets(arguments: argparse.Namespace) -> None:
    """Score the labels in files by the true ones in `--list`."""
    if not arguments.predictions or not arguments.list:
        raise UserError(f"{arguments.benchmark}: give the labels with --predictions and the true ones with --list")
    if arguments.benchmark == SYNONYMS_NAME:
        _evaluate_synonyms(arguments)
        return
    if not arguments.wheels:
        raise UserError("--wheels: give the folder emotion_wheel of MERTools (MER2025_Track23)")
    wheels = EmotionWheels.load(arguments.wheels)
    extract = _make_extractor(arguments, wheels)
    if arguments.benchmark != UNIBENCH_NAME:
        open_set = OPEN_SETS[arguments.benchmark]
        evaluation, how = _evaluate(open_set, arguments.predictions, arguments.list, wheels, extract)
        save_open(evaluation, wheels, how, arguments.out)
        _print(evaluation)
        return
    evaluations = {}
    for one in UNIBENCH:
        predictions, truth = (_file_of(folder, one.name) for folder in (arguments.predictions, arguments.list))
        if predictions and truth:
            evaluations[one.name], how = _evaluate(one, predictions, truth, wheels, extract)
            _print(evaluations[one.name])
    if not evaluations:
        raise UserError(f"no set is in both {arguments.predictions} and {arguments.list}; name files as mer2023.csv")
    save_unibench(evaluations, wheels, how, arguments.out)
    mean = unibench_mean(evaluations)
    missing = ", ".join(one.name for one in UNIBENCH if one.name not in evaluations)
    print(f"no mean of the nine sets: {missing} missing" if mean is None else f"mean of the nine: {100 * mean:.2f} %")


def _file_of(folder: Path, name: str) -> Path | None:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; {UNIBENCH_NAME} takes one of files named as mer2023.csv")
    found = (folder / f"{name}{suffix}" for suffix in SUFFIXES)
    return next((path for path in found if path.is_file()), None)


Extractor = Callable[[Path], Extracted]


def _make_extractor(arguments: argparse.Namespace, wheels: EmotionWheels) -> Extractor:
    """Make the function from a file to its labels; those taken from descriptions are written into the results, too."""
    if arguments.extract is None:
        return lambda path: Extracted(read_label_sets(path), "as given")
    if arguments.extract == "chat":
        judge = Judge(ChatConfig.from_environment("judge"), arguments.out / "judge")
        extract = lambda descriptions: extract_by_judge(judge, descriptions)
    elif arguments.extract == "words":
        extract = lambda descriptions: extract_by_words(descriptions, wheels)
    else:
        extract = _by_likelihood(arguments, wheels)

    def extract_and_save(path: Path) -> Extracted:
        found = extract(read_descriptions(path))
        write_label_sets(arguments.out / f"{path.stem}-openset.npz", found.labels)
        _name(found.failed, "descriptions without labels, as the chat model gave none")
        return found

    return extract_and_save


def _by_likelihood(arguments: argparse.Namespace, wheels: EmotionWheels) -> Callable[[Mapping[str, str]], Extracted]:
    if (run := Run.find(arguments.trained)) is None:
        raise UserError("--extract likelihood: name the run whose model says how likely words are with --trained")
    model, tokenizer = load_run(run, images="image_tokens")
    how = f"likelihood of the wheels' words under {arguments.trained}, step {run.step}"

    def extract(descriptions: Mapping[str, str]) -> Extracted:
        progress = Progress(len(descriptions), "description")
        found = extract_by_likelihood(
            model.llama, tokenizer, descriptions, wheels.vocabulary, how=how, progress=progress
        )
        progress.close()
        return found

    return extract


def _evaluate(
    open_set: OpenSet, predictions: Path, truth: Path, wheels: EmotionWheels, extract: Extractor
) -> tuple[OpenEvaluation, str]:
    true = read_sentiments(truth) if open_set.kind == "sentiment" else read_label_sets(truth)
    found = extract(predictions)
    return evaluate_open(open_set, true, found.labels, wheels), found.how


def _evaluate_synonyms(arguments: argparse.Namespace) -> None:
    if not arguments.synonyms:
        raise UserError(f"--synonyms: {SYNONYMS_NAME} needs the groups of synonyms, a folder of .npy")
    truth, predictions = read_label_sets(arguments.list), read_label_sets(arguments.predictions)
    groups = read_synonyms(arguments.synonyms)
    if not (names := [name for name in truth if name in groups]):
        raise UserError(f"no clip of {arguments.list} has synonyms in {arguments.synonyms}; check the names")
    given = [predictions.get(name, ()) for name in names]
    scores = synonym_set_scores([truth[name] for name in names], given, [groups[name] for name in names])
    save_synonym_scores(scores, len(names), arguments.out)
    print(f"{', '.join(f'{name} {100 * value:.2f} %' for name, value in scores.items())}; {len(names)} clips")
    _name([name for name in names if name not in predictions], "clips without an answer, counted as no label")


def _print(evaluation: OpenEvaluation) -> None:
    shown = (_score(name, evaluation.scores) for name in HEADINGS if name in evaluation.scores)
    print(f"{evaluation.open_set.title}: {', '.join(shown)}; {evaluation.clips} clips, {evaluation.scored} scored")
    first = evaluation.open_set.first_metric
    floors = (f"{who} {100 * scores[first]:.2f} %" for who, scores in evaluation.floors.items())
    print(f"floor of constant answers, {HEADINGS[first]}: {', '.join(floors)}")
    if evaluation.count_note:
        print(evaluation.count_note)
    _name(evaluation.unanswered, "clips without an answer, counted as no label")
    _name(evaluation.others, "answers about other clips, left out")


def _score(name: str, scores: Mapping[str, float]) -> str:
    value = f"{scores[name]:.2f}" if name == "list_length" else f"{100 * scores[name]:.2f} %"
    return f"{HEADINGS[name]} {value}"


def _name(clips: Sequence[str], what: str) -> None:
    if clips:
        print(f"{len(clips)} {what}: {', '.join(clips[:3])}{', ...' if len(clips) > 3 else ''}")

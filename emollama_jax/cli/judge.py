"""Judge free-form answers by the annotators' descriptions (EMER)."""

import argparse
import sys

from etils import epath

from emollama_jax.cli._arguments import VerbParser
from emollama_jax.data.records import open_split
from emollama_jax.eval.answer_files import labels_of_records, read_answers, read_labels
from emollama_jax.eval.emer_report import evaluate_emer, save_emer, to_markdown
from emollama_jax.eval.judge import Judge
from emollama_jax.io.chat import ChatConfig
from emollama_jax.io.paths import as_path, local_path


def run(argv: list[str]) -> int:
    arguments = make_parser().parse_args(argv)
    if ":" in arguments.references and not as_path(arguments.references).exists():
        records = open_split(arguments.references)
        references, labels = labels_of_records([records], "caption_fine"), labels_of_records([records])
    else:
        references, labels = read_labels(local_path(arguments.references), "caption_fine"), {}
    if arguments.list:
        labels = read_labels(arguments.list)
    judge = None
    if arguments.judge:
        judge = Judge(ChatConfig.from_environment("judge"), arguments.cache or arguments.out / "judge")
    answers = read_answers(arguments.answers, ("answer", "caption_fine")).answers
    report = evaluate_emer(answers, references, labels, judge)
    save_emer(report, arguments.out)
    print(to_markdown(report), end="")
    print(f"wrote {arguments.out}")
    if unscored := [kind for kind, found in report.get("overlap", {}).items() if found["mean"] is None]:
        print(f"the judge scored no clip ({', '.join(unscored)} overlap)", file=sys.stderr)
        return 1
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = VerbParser(
        prog="emollama judge",
        description="Scores how far free-form answers overlap with the annotators' descriptions (EMER): by common "
        "words and, with --judge, by a language model that compares clues and emotions. The model is any endpoint for "
        "chat completions: EMOLLAMA_JUDGE_ADDRESS, EMOLLAMA_JUDGE_MODEL and EMOLLAMA_JUDGE_KEY name it. Exit code 1: "
        "it scored no clip.",
        epilog="example: emollama judge answers.jsonl EMER.csv --judge --out results",
    )
    parser.add_argument("answers", type=local_path, metavar="ANSWERS", help="a table or .jsonl of name and answer")
    parser.add_argument("references", metavar="REFERENCES", help="a table of names and descriptions, or FOLDER:SPLIT")
    parser.add_argument("--out", type=epath.Path, required=True, metavar="FOLDER", help="the results")
    parser.add_argument(
        "--list", type=local_path, metavar="FILE", help="names and labels, for the share of answers that hit"
    )
    parser.add_argument("--judge", action="store_true", help="ask the language model, too")
    parser.add_argument("--cache", type=epath.Path, metavar="FOLDER", help="the model's replies (default: OUT/judge)")
    return parser

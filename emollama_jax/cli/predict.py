"""Ask a model about videos or records."""

import argparse
import functools
import sys

from etils import epath

from emollama_jax.cli._arguments import VerbParser, at_least
from emollama_jax.cli._model import add_model_arguments, inputs_of_records, model_options, read_experiment
from emollama_jax.cli._progress import Progress
from emollama_jax.cli._subtitles import add_subtitle_arguments, check_subtitle_arguments
from emollama_jax.data.datasets import find_encoders, open_datasets
from emollama_jax.data.modalities import ALL, check_modalities
from emollama_jax.errors import UserError
from emollama_jax.infer.batch_run import answer_all
from emollama_jax.infer.engine import Engine
from emollama_jax.infer.inputs import RecordClips, find_items
from emollama_jax.infer.output import PrintedOutput, open_output
from emollama_jax.infer.predictor import task_questions
from emollama_jax.io.paths import as_path, local_path
from emollama_jax.io.worker_pool import default_workers
from emollama_jax.media.clip import FRAME_RULES
from emollama_jax.text.prompts import FEATURES, TASKS

EXIT_CODES = """exit codes:
  0    every clip is answered
  1    some clips failed: the output says which and why
  2    arguments, a manifest or data that do not fit
  3    the model could not start
  4    another process writes the output, or it is damaged
  130  interrupted; --resume goes on"""


def run(argv: list[str]) -> int:
    config, arguments = read_experiment(make_parser(), argv)
    _check_arguments(arguments)
    options = model_options(arguments) | {"modalities": arguments.modalities, "orders": arguments.orders}
    options["slots"] = arguments.batch_size
    is_data = ":" in arguments.input and not as_path(arguments.input).exists()
    if is_data:
        datasets = open_datasets([arguments.input], config, "input")
        source = RecordClips(datasets[0].records)
        items, options["inputs"] = source.items, inputs_of_records(arguments, datasets)
        settings = {"encoders": find_encoders(datasets), "data": datasets[0].records.metadata.get("fingerprint")}
    else:
        items = find_items(arguments.input, arguments.videos)
        options |= {name: getattr(arguments, name) for name in (*FEATURES, "random_encoders", "recogniser")}
        options |= {"frame_rule": arguments.frame, "subtitle_sources": arguments.subtitles_from}
        options["subtitle_language"] = arguments.subtitle_language
        options["workers"] = default_workers() if arguments.workers is None else arguments.workers
        settings = {}
    by_score = arguments.task == "emotion" and not arguments.question
    questions = () if by_score else task_questions(config.prompt, arguments.task, arguments.question)
    out = arguments.out
    with (
        open_output(out, resume=arguments.resume)
        if out
        else PrintedOutput(functools.partial(print, flush=True)) as output
    ):
        engine = Engine.load(config=config, log=lambda line: print(line, file=sys.stderr), **options)
        source = source if is_data else engine.videos()
        if out:
            output.claim(engine.identity(requests=list(questions), **settings))
        progress = Progress(len(items), "clip")
        how = {"questions": questions, "batch_size": arguments.batch_size, "progress": progress}
        summary = answer_all(engine, items, source, output, **how)
        progress.close()
    print(f"{summary}{f': {out}' if out else ''}", file=sys.stderr)
    return 1 if summary.failed else 0


def make_parser() -> argparse.ArgumentParser:
    parser = VerbParser(
        prog="emollama predict",
        usage="emollama predict INPUT --trained RUN [--out FILE [--resume]] [--task TASK | --question TEXT] [...]",
        description="Asks the model about each clip: a video, the videos of a folder or of a manifest (a table or\n"
        ".jsonl of name, video, subtitle, question, or a .txt of videos), or prepared records. Writes one line of\n"
        "JSON a clip: the answer, each label's probability, the frame taken, faces found, seconds; or an error with\n"
        "its stage. Killed at any moment, it goes on with --resume, asks again about what failed, and ends with the\n"
        "same answers. Without --out the lines are printed and not kept.",
        epilog=f"example: emollama predict clip.mp4 --trained runs/stage2\n"
        f"         emollama predict videos --trained runs/stage2 --task reason --out answers.jsonl\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", help="a video, a folder, a manifest, or FOLDER:SPLIT of prepared records")
    parser.add_argument("--out", type=epath.Path, metavar="FILE", help="where to keep the lines (default: print them)")
    parser.add_argument("--resume", action="store_true", help="keep the answers in --out and add what is missing")
    group = parser.add_argument_group("what is asked")
    group.add_argument(
        "--task", choices=TASKS, default="emotion", help="emotion is answered by the most likely label (the default)"
    )
    group.add_argument(
        "--question",
        action="append",
        default=[],
        metavar="TEXT",
        help="asked in place of the task's question, e.g. '[reason] Why?'; given again, the next one is asked after it",
    )
    group.add_argument("--orders", type=at_least(1), default=1, metavar="N", help="of the labels (default: 1)")
    group.add_argument(
        "--modalities", type=str, default=ALL, help="any of A (audio), V (video), T (text) (default: %(default)s)"
    )
    group = parser.add_argument_group("how clips are read")
    group.add_argument(
        "--videos", type=local_path, metavar="FOLDER", help="of a manifest's videos (default: its own folder)"
    )
    group.add_argument(
        "--frame",
        metavar="RULE",
        help=f"{', '.join(FRAME_RULES)} or a number from 0 (default: that of the run's data, else first)",
    )
    add_subtitle_arguments(group)
    group.add_argument("--workers", type=at_least(0), metavar="N", help="reading processes (default: the processors)")
    group.add_argument("--batch-size", type=at_least(1), default=16, metavar="N", help="clips (default: %(default)s)")
    add_model_arguments(parser)
    for name, what in zip(FEATURES, ("face", "motion", "voice"), strict=True):
        default = f"default: weights.{name}; '' for none"
        parser.add_argument(f"--{name}", metavar="FILE", help=f"the encoder of the {what} ({default})")
    parser.add_argument("--random-encoders", action="store_true", help="untrained encoders, for trials")
    return parser


def _check_arguments(arguments: argparse.Namespace) -> None:
    check_modalities(arguments.modalities)
    if arguments.resume and not arguments.out:
        raise UserError("--resume: goes with --out, whose answers it keeps")
    if arguments.question and arguments.task != "emotion":
        raise UserError("--question: goes in place of --task; write its tag into the question")
    if arguments.frame is not None and arguments.frame not in FRAME_RULES and not arguments.frame.isdecimal():
        raise UserError(f"--frame {arguments.frame}: give {', '.join(FRAME_RULES)} or a frame's number from 0")
    check_subtitle_arguments(arguments)
    if arguments.random_encoders and any(getattr(arguments, name) for name in FEATURES):
        raise UserError("--random-encoders: goes in place of --mae, --videomae and --hubert")

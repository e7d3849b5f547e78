"""Ask a model about videos or records."""

import argparse
import functools
import os
import sys
from contextlib import AbstractContextManager

from etils import epath

from emollama_jax.cli._arguments import VerbParser, at_least
from emollama_jax.cli._model import (
    add_encoder_arguments,
    add_frame_argument,
    add_model_arguments,
    check_video_arguments,
    inputs_of_records,
    model_options,
    read_experiment,
    video_options,
)
from emollama_jax.cli._progress import Progress
from emollama_jax.cli._serve import KEY, import_serve
from emollama_jax.cli._subtitles import add_subtitle_arguments, check_subtitle_arguments
from emollama_jax.data.datasets import find_encoders, open_datasets
from emollama_jax.data.modalities import ALL, check_modalities
from emollama_jax.errors import UserError
from emollama_jax.infer.batch_run import Summary, answer_all
from emollama_jax.infer.engine import Engine
from emollama_jax.infer.inputs import RecordClips, find_items
from emollama_jax.infer.output import Output, PrintedOutput, open_output
from emollama_jax.infer.predictor import task_questions
from emollama_jax.io.paths import as_path, local_path
from emollama_jax.io.worker_pool import default_workers
from emollama_jax.text.prompts import TASKS, PromptConfig

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
    if arguments.server:
        return _ask_server(arguments)
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
        options |= video_options(arguments)
        options["workers"] = default_workers() if arguments.workers is None else arguments.workers
        settings = {}
    by_score = arguments.task == "emotion" and not arguments.question
    questions = () if by_score else task_questions(config.prompt, arguments.task, arguments.question)
    with _open(arguments) as output:
        engine = Engine.load(config=config, log=lambda line: print(line, file=sys.stderr), **options)
        source = source if is_data else engine.videos()
        if arguments.out:
            output.claim(engine.identity(requests=list(questions), **settings))
        progress = Progress(len(items), "clip")
        how = {"questions": questions, "batch_size": arguments.batch_size, "progress": progress}
        summary = answer_all(engine, items, source, output, **how)
        progress.close()
    return _report(summary, arguments)


def _ask_server(arguments: argparse.Namespace) -> int:
    remote = import_serve("remote")
    items, questions = find_items(arguments.input, arguments.videos), ()
    if arguments.task != "emotion" or arguments.question:
        questions = task_questions(PromptConfig(), arguments.task, arguments.question)
    options = {"orders": arguments.orders} if arguments.orders > 1 else {}
    options |= {"modalities": arguments.modalities} if arguments.modalities != ALL else {}
    key = os.environ.get(KEY, "") if arguments.api_key is None else arguments.api_key
    engine = remote.RemoteEngine(arguments.server, key, options=options)
    with _open(arguments) as output:
        identity = engine.identity(requests=list(questions))
        if arguments.out:
            output.claim(identity)
        progress = Progress(len(items), "clip")
        how = {"questions": questions, "batch_size": arguments.batch_size, "progress": progress}
        summary = answer_all(engine, items, remote.RemoteClips(), output, **how)
        progress.close()
    return _report(summary, arguments)


def _open(arguments: argparse.Namespace) -> AbstractContextManager[Output]:
    if arguments.out:
        return open_output(arguments.out, resume=arguments.resume)
    return PrintedOutput(functools.partial(print, flush=True))


def _report(summary: Summary, arguments: argparse.Namespace) -> int:
    """Say what came of it, and return the exit code."""
    print(f"{summary}{f': {arguments.out}' if arguments.out else ''}", file=sys.stderr)
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
    group = parser.add_argument_group("another machine's model")
    group.add_argument("--server", metavar="URL", help="of an emollama serve, asked in place of a model here")
    group.add_argument("--api-key", metavar="KEY", help=f"that the server asks for (default: ${KEY})")
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
    add_frame_argument(group)
    add_subtitle_arguments(group)
    group.add_argument("--workers", type=at_least(0), metavar="N", help="reading processes (default: the processors)")
    group.add_argument("--batch-size", type=at_least(1), default=16, metavar="N", help="clips (default: %(default)s)")
    add_model_arguments(parser)
    add_encoder_arguments(parser)
    return parser


def _check_arguments(arguments: argparse.Namespace) -> None:
    check_modalities(arguments.modalities)
    if arguments.resume and not arguments.out:
        raise UserError("--resume: goes with --out, whose answers it keeps")
    if arguments.api_key and not arguments.server:
        raise UserError("--api-key: goes with --server")
    if arguments.server:
        _check_server_arguments(arguments)
    if arguments.question and arguments.task != "emotion":
        raise UserError("--question: goes in place of --task; write its tag into the question")
    check_subtitle_arguments(arguments)
    check_video_arguments(arguments)


def _check_server_arguments(arguments: argparse.Namespace) -> None:
    """Raises UserError for what a server decides by itself."""
    here = ("trained", "base", "frame", "recogniser", "random_encoders", "mae", "videomae", "hubert", "eva_vit")
    if given := [name for name in (*here, "subtitles_from") if getattr(arguments, name)]:
        raise UserError(f"--{given[0].replace('_', '-')}: the server has its own; leave it out beside --server")
    if len(arguments.question) > 1:
        raise UserError("--question: a server is asked one question a clip; give it once")
    if ":" in arguments.input and not as_path(arguments.input).exists():
        raise UserError(f"{arguments.input}: a server is asked about videos; give a video, a folder or a manifest")

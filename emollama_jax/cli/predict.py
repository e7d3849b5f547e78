"""Ask a model about videos or records; goes on where it was stopped."""

import argparse
import functools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from emollama_jax.cli._arguments import at_least
from emollama_jax.cli._model import (
    add_model_arguments,
    image_encoder_of,
    load_model,
    mesh_of,
    on_devices,
    read_experiment,
    starting,
)
from emollama_jax.cli._progress import Progress
from emollama_jax.cli._subtitles import add_subtitle_arguments, check_subtitle_arguments, transcribe_of
from emollama_jax.config import Config
from emollama_jax.data.datasets import IndexedRecords, find_encoders, find_images, open_datasets
from emollama_jax.errors import UserError
from emollama_jax.features.encoders import load_encoders, random_encoders
from emollama_jax.infer.batch_run import Asked, answer_all
from emollama_jax.infer.identity import identity_of
from emollama_jax.infer.inputs import ClipSource, Item, RecordClips, VideoClips, find_items
from emollama_jax.infer.output import open_output
from emollama_jax.infer.predictor import ALL, Predictor, check_modalities, requests_of
from emollama_jax.io.worker_pool import default_workers
from emollama_jax.media.clip import FRAME_RULES
from emollama_jax.models.eva_vit import EvaVit
from emollama_jax.runs.run import Run
from emollama_jax.text.prompts import FEATURES, TASKS

EXIT_CODES = """exit codes:
  0    every clip is answered
  1    some clips failed: the output says which and why
  2    arguments, a manifest or data that do not fit
  3    the model could not start
  4    another process writes the output, or it is damaged
  130  interrupted; --resume goes on"""


@dataclass(frozen=True)
class _Input:
    """What is asked about: the clips, what reads them, how the model sees their frames, and what is told of them."""

    items: Sequence[Item]
    source: ClipSource
    encoders: Mapping[str, str]
    """Fingerprints."""
    files: Mapping[str, str]
    """Of the encoder of frames."""
    told: Mapping[str, Any]
    eva_vit: EvaVit | None = None


def run(argv: list[str]) -> int:
    config, arguments, trained = read_experiment(_parser(), argv)
    _check_arguments(arguments)
    is_data = ":" in arguments.input and not Path(arguments.input).exists()
    items = None if is_data else find_items(arguments.input, arguments.videos)
    datasets = open_datasets([arguments.input], config, "input") if is_data else None
    mesh = mesh_of(config)
    with open_output(arguments.out, resume=arguments.resume) as output, on_devices(config, mesh):
        if is_data:
            given = _records(config, arguments, trained, datasets)
        else:
            given = _videos(config, arguments, trained, items, mesh)
        if trained and not arguments.any_encoders:
            trained.check_encoders(given.encoders, all_known=not is_data)
        model, tokenizer = load_model(config, arguments, trained, mesh, files=given.files, eva_vit=given.eva_vit)
        predictor = Predictor(model, tokenizer, config, modalities=arguments.modalities, orders=arguments.orders)
        by_score = arguments.task == "emotion" and not arguments.question
        asked = Asked(() if by_score else requests_of(config.prompt, arguments.task, arguments.question))
        settings = {"requests": list(asked.requests), "modalities": predictor.modalities, "orders": arguments.orders}
        output.claim(identity_of(config, model, arguments.base, encoders=given.encoders, **given.told, **settings))
        progress = Progress(len(given.items), "clip")
        options = {"batch_size": arguments.batch_size, "progress": progress}
        summary = answer_all(given.items, given.source, predictor, asked, output, **options)
        progress.close()
    if len(given.items) == 1:
        print(json.dumps(output.known[given.items[0].key], ensure_ascii=False, indent=1))
    print(f"{summary}: {arguments.out}", file=sys.stderr)
    return 1 if summary.failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="emollama predict",
        usage="emollama predict INPUT --out FILE --trained RUN [--base FOLDER] [--mae FILE --videomae FILE\n"
        "                        --hubert FILE --eva-vit FILE] [--task TASK | --question TEXT] [--resume] [...]",
        description="Asks the model about each clip: a video, the videos of a folder or of a manifest (.csv, .jsonl\n"
        "or .txt with name, video, subtitle, question), or prepared records. Writes one line of JSON a clip: the\n"
        "answer, each label's probability, the frame taken, faces found, seconds; or an error with its stage. Killed\n"
        "at any moment, it goes on with --resume, asks again about what failed, and ends with the same answers.",
        epilog=f"example: emollama predict videos --out answers.jsonl --trained runs/stage2 --mae vit-mae-large "
        f"--videomae videomae-large --hubert chinese-hubert-large --task reason\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", help="a video, a folder, a manifest, or FOLDER:SPLIT of prepared records")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the answers, as JSON lines")
    parser.add_argument("--resume", action="store_true", help="go on with the answers that are there")
    group = parser.add_argument_group("what is asked")
    group.add_argument(
        "--task", choices=TASKS, default="emotion", help="emotion is answered by the likeliest label (the default)"
    )
    group.add_argument(
        "--question",
        action="append",
        default=[],
        metavar="TEXT",
        help="in place of a task's, with a task's tag where it is to have one, as in '[reason] Why?'; more are asked "
        "after it, with the answers in sight",
    )
    group.add_argument("--orders", type=at_least(1), default=1, metavar="N", help="of the labels (default: 1)")
    group.add_argument(
        "--modalities", type=str, default=ALL, help="any of A (audio), V (video), T (text) (default: %(default)s)"
    )
    group = parser.add_argument_group("how clips are read")
    group.add_argument("--videos", type=Path, metavar="FOLDER", help="of a manifest's videos (default: its own folder)")
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
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"the encoder of the {what}")
    parser.add_argument("--random-encoders", action="store_true", help="untrained ones of the experiment's sizes")
    return parser


def _check_arguments(arguments: argparse.Namespace) -> None:
    check_modalities(arguments.modalities)
    if arguments.question and arguments.task != "emotion":
        raise UserError("--question: goes in place of --task; write its tag into the question")
    if arguments.frame is not None and arguments.frame not in FRAME_RULES and not arguments.frame.isdecimal():
        raise UserError(f"--frame {arguments.frame}: give {', '.join(FRAME_RULES)} or a frame's number from 0")
    check_subtitle_arguments(arguments)
    if arguments.random_encoders and any(getattr(arguments, name) for name in FEATURES):
        raise UserError("--random-encoders: goes in place of --mae, --videomae and --hubert")


def _records(
    config: Config, arguments: argparse.Namespace, trained: Run | None, datasets: Sequence[IndexedRecords]
) -> _Input:
    (numbered,) = datasets
    source = RecordClips(numbered.records)
    files = image_encoder_of(config, arguments, trained) if find_images(datasets) == "frames" else {}
    told = {"data": numbered.records.metadata.get("fingerprint")}
    return _Input(source.items, source, find_encoders(datasets), files, told)


def _videos(
    config: Config, arguments: argparse.Namespace, trained: Run | None, items: Sequence[Item], mesh: Mesh | None
) -> _Input:
    is_random = arguments.random_encoders
    files = {} if is_random and not arguments.eva_vit else image_encoder_of(config, arguments, trained)
    if is_random:
        encoders = random_encoders(config, eva_vit=not files, mesh=mesh)
    else:
        with starting():
            encoders = load_encoders(config, **{name: getattr(arguments, name) for name in FEATURES}, mesh=mesh)
    encoders.check_sizes(config)
    frame = choose_frame_rule(arguments.frame, trained)
    source = VideoClips(
        config,
        functools.partial(encoders.features, size=config.projectors.feature_size),
        encoders.read_spec(config.eva_vit.image_size),
        frame_rule=frame,
        subtitle_sources=arguments.subtitles_from,
        transcribe=transcribe_of(arguments),
        workers=default_workers() if arguments.workers is None else arguments.workers,
    )
    told = {"frame": frame, "subtitles_from": list(arguments.subtitles_from)}
    return _Input(items, source, encoders.fingerprints(config), files, told, encoders.eva_vit)


def choose_frame_rule(asked: str | None, trained: Run | None) -> str:
    """Returns the rule asked for, else the one of the data that the run was trained on, else first.

    Says on stderr which one was not asked for, and which one the run was not trained on.
    """
    learnt = trained.provenance.frame_rules if trained else ()
    why = f"{trained.path} was trained on frames by {', '.join(learnt)}" if learnt else "the default"
    if asked is not None:
        if learnt and asked not in learnt:
            print(f"warning: --frame {asked}, and {why}", file=sys.stderr)
        return asked
    rule = learnt[0] if len(learnt) == 1 else "first"
    print(f"frame rule: {rule} ({why}); --frame takes another", file=sys.stderr)
    return rule

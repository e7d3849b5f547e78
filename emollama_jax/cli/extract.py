"""Turn raw videos into features and records, or compare two sets of features."""

import argparse
import json
import sys
from pathlib import Path

import jax

from emollama_jax.cli._arguments import add_group_arguments, at_least
from emollama_jax.cli._data_sets import add_arguments, check_image, sources_of, write_data_set
from emollama_jax.cli._progress import Progress
from emollama_jax.cli._subtitles import add_subtitle_arguments, check_subtitle_arguments, transcribe_of
from emollama_jax.config import Config, parse_flags
from emollama_jax.data.annotations import Annotations
from emollama_jax.data.builders import FACTS
from emollama_jax.distributed import NotStarted, barrier, find_group, process_group
from emollama_jax.errors import UserError
from emollama_jax.features.compare import INTERCHANGEABLE, SAME, compare
from emollama_jax.features.encoders import Encoders, load_encoders, local_mesh, random_encoders
from emollama_jax.features.extract import Extraction, extraction_recipe

LONGEST_WAIT_S = 7 * 24 * 3600  # for a process that has more to do than the others
FILES = ("mae", "videomae", "hubert", "eva_vit")


def run(argv: list[str]) -> int:
    if "--check" in argv:
        return _check(argv)
    parser = _parser()
    if {"-h", "--help"} & set(argv):
        parser.parse_args(argv)
    config, rest = parse_flags(argv)
    arguments = parser.parse_args(rest)
    _check_arguments(arguments)
    sources_of(arguments)  # what is wrong with them is said before the encoders are loaded
    group = find_group(arguments.coordinator, arguments.processes, arguments.process, pod=arguments.pod)
    try:
        with process_group(group):
            return _extract(config, arguments)
    except NotStarted as error:
        print(f"emollama extract: error: {error}", file=sys.stderr)
        return 3


def _extract(config: Config, arguments: argparse.Namespace) -> int:
    encoders, process = _encoders(config, arguments), (jax.process_index(), jax.process_count())
    extraction = Extraction(
        config,
        encoders,
        workers=arguments.workers,
        batch_size=arguments.batch_size,
        share=process,
        transcribe=transcribe_of(arguments),
        npy=arguments.npy,
    )

    def make_parts(annotations: Annotations) -> Extraction:
        progress = Progress(len(annotations.clips) // process[1], "clip")
        extraction.on_part = lambda clips, aside: progress(clips)
        return extraction

    prepared, code = write_data_set(
        arguments,
        lambda labels: extraction_recipe(
            config, encoders, labels=labels, frame=arguments.frame, subtitles=arguments.subtitles_from
        ),
        make_parts,
        process=process[0],
        wait_for_all=lambda reason: barrier(reason, LONGEST_WAIT_S),
    )
    if process[0] == 0:
        _report(prepared.path, extraction.seconds)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="emollama extract",
        usage="emollama extract --config NAME_OR_PATH DATA [FOLDER] --mae FILE --videomae FILE --hubert FILE [...]\n"
        "       emollama extract --check A B [--json FILE]",
        description="Reads the videos of a data set, finds the face in them, runs the encoders of face, motion and "
        "voice, and writes records as emollama prepare does. An encoder that is not given leaves its feature to the "
        "data set's own files. Goes on where it was stopped; a clip that cannot be read is reported and put aside "
        "(exit code 1). On several hosts the same command on each shares the work; --out is then a folder they share. "
        "--check compares two sets of features, each FOLDER or FOLDER:SPLIT of records or a folder of .npy files; exit "
        "code 0: they can be mixed.",
        epilog="example: emollama extract --config stage1_merr merr MERR --frame peak --mae vit-mae-large "
        "--videomae videomae-large --hubert chinese-hubert-large",
    )
    add_arguments(parser)
    group = parser.add_argument_group("the encoders")
    group.add_argument("--mae", type=Path, metavar="FILE", help="of the face: a Hugging Face folder or a .pth file")
    group.add_argument("--videomae", type=Path, metavar="FOLDER", help="of the motion")
    group.add_argument("--hubert", type=Path, metavar="FOLDER", help="of the voice")
    group.add_argument(
        "--random-encoders", action="store_true", help="untrained ones of the experiment's sizes: for trials"
    )
    group.add_argument("--batch-size", type=at_least(1), default=32, metavar="N", help="images (default: %(default)s)")
    parser.add_argument("--npy", type=Path, metavar="FOLDER", help="also write the reference's folders of .npy files")
    add_subtitle_arguments(parser)
    add_group_arguments(parser)
    return parser


def _check_arguments(arguments: argparse.Namespace) -> None:
    check_subtitle_arguments(arguments)
    given = [name for name in FILES if getattr(arguments, name)]
    if bool(given) == arguments.random_encoders:
        raise UserError("give encoders (--mae, --videomae, --hubert, --eva-vit), or --random-encoders for a trial")
    if not arguments.random_encoders:
        check_image(arguments)


def _encoders(config: Config, arguments: argparse.Namespace) -> Encoders:
    if arguments.random_encoders:
        return random_encoders(config, eva_vit=arguments.image == "image_tokens", mesh=local_mesh())
    return load_encoders(config, **{name: getattr(arguments, name) for name in FILES}, mesh=local_mesh())


def _report(path: Path, seconds: dict[str, float]) -> None:
    """What was seen and heard in all, and what took the time."""
    clip_info = [json.loads(line) for line in (path / FACTS).read_text(encoding="utf-8").splitlines()]
    without = [info["name"] for info in clip_info if info.get("faces_found") == 0]
    silent = sum("sound_seconds" not in info for info in clip_info)
    named = f" ({', '.join(without[:3])}{', ...' if len(without) > 3 else ''})" if without else ""
    print(f"no face in {len(without)} of {len(clip_info)} clips{named}, no sound in {silent}; see {path / FACTS}")
    if seconds:
        print("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()))


def _check(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="emollama extract --check")
    parser.add_argument("--check", nargs=2, metavar=("A", "B"), required=True)
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures for programs")
    arguments = parser.parse_args(argv)
    comparison = compare(*arguments.check)
    print(comparison)
    if arguments.json:
        arguments.json.write_text(json.dumps(comparison.to_dict(), indent=2) + "\n", encoding="utf-8")
    return 0 if comparison.verdict in (SAME, INTERCHANGEABLE) else 1

"""Turn raw videos into features and records."""

import argparse
from collections.abc import Mapping, Sequence

import jax
from etils import epath

from emollama_jax.cli._arguments import (
    VerbParser,
    add_config_argument,
    add_process_arguments,
    at_least,
    parse,
    start_processes,
)
from emollama_jax.cli._data_sets import add_arguments, annotation_files_of, check_image, write_data_set
from emollama_jax.cli._progress import Progress
from emollama_jax.cli._subtitles import add_subtitle_arguments, check_subtitle_arguments, transcribe_of
from emollama_jax.config import Config
from emollama_jax.data.annotation_files import AnnotationFiles
from emollama_jax.data.annotations import Annotations
from emollama_jax.data.parts import PartMaker
from emollama_jax.data.records import CLIP_INFO_FILE, read_clip_info
from emollama_jax.distributed import barrier
from emollama_jax.errors import UserError
from emollama_jax.features.encoders import load_encoders, local_mesh, random_encoders
from emollama_jax.features.extract import extraction_part_maker, extraction_recipe
from emollama_jax.io.paths import PathLike, as_path
from emollama_jax.text.prompts import FEATURES

LONGEST_WAIT_S = 7 * 24 * 3600  # for a process that has more to do than the others
ENCODERS = (*FEATURES, "eva_vit")


def run(argv: list[str]) -> int:
    if "--check" in argv:
        raise UserError("extract --check is a verb of its own: emollama compare A B")
    config, arguments = parse(make_parser(), argv)
    check_subtitle_arguments(arguments)
    files = annotation_files_of(arguments)  # what is wrong with them is said before the encoders are loaded
    weights = _encoder_files(config, arguments)
    with start_processes(arguments):
        return _extract(config, arguments, files, weights)


def _extract(
    config: Config, arguments: argparse.Namespace, files: AnnotationFiles, weights: Mapping[str, PathLike] | None
) -> int:
    if weights is None:
        encoders = random_encoders(config, eva_vit=arguments.image_storage == "image_tokens", mesh=local_mesh())
    else:
        encoders = load_encoders(config, **weights, mesh=local_mesh())
    process, num_processes = jax.process_index(), jax.process_count()
    recipe = extraction_recipe(
        config,
        encoders,
        labels=files.labels,
        frame_rule=arguments.frame_rule,
        subtitle_sources=arguments.subtitles_from,
        subtitle_language=arguments.subtitle_language,
    )
    maker = extraction_part_maker(
        config,
        encoders,
        workers=arguments.workers,
        batch_size=arguments.batch_size,
        npy=arguments.npy,
        shard_index=process,
        num_shards=num_processes,
        transcribe=transcribe_of(arguments),
    )

    def make_parts(annotations: Annotations) -> PartMaker:
        progress = Progress(len(annotations.clips) // num_processes, "clip")
        maker.on_part = lambda clips, aside: progress(clips)
        return maker

    prepared, code = write_data_set(
        arguments.data,
        files,
        recipe,
        make_parts,
        out=arguments.out,
        report=arguments.report,
        strict=arguments.strict,
        process=process,
        wait_for_all=lambda reason: barrier(reason, LONGEST_WAIT_S),
    )
    if process == 0:
        _report(prepared.path, maker.clock.seconds)
    return code


def make_parser() -> argparse.ArgumentParser:
    parser = VerbParser(
        prog="emollama extract",
        usage="emollama extract --config NAME_OR_PATH DATA [FOLDER] [--mae FILE --videomae FILE --hubert FILE] [...]",
        description="Reads the videos of a data set, finds the face in them, runs the encoders of face, motion and "
        "voice, and writes records as emollama prepare does. Where no encoder is given, they are the experiment's "
        "(config.weights); where some are, the other features come from the data set's own files. Goes on where it was "
        "stopped; a clip that cannot be read is reported and put aside (exit code 1). On several hosts the same "
        "command on each shares the work; --out is then a folder they share.",
        epilog="example: emollama extract --config stage1_merr merr MERR --frame-rule peak --workers 16",
    )
    add_config_argument(parser)
    add_arguments(parser)
    group = parser.add_argument_group("the encoders")
    group.add_argument(
        "--mae", type=epath.Path, metavar="FILE", help="of the face: a Hugging Face folder or a .pth file"
    )
    group.add_argument("--videomae", type=epath.Path, metavar="FOLDER", help="of the motion")
    group.add_argument("--hubert", type=epath.Path, metavar="FOLDER", help="of the voice")
    group.add_argument(
        "--random-encoders", action="store_true", help="untrained ones of the experiment's sizes: for trials"
    )
    group.add_argument("--batch-size", type=at_least(1), default=32, metavar="N", help="images (default: %(default)s)")
    parser.add_argument(
        "--npy", type=epath.Path, metavar="FOLDER", help="also write the reference's folders of .npy files"
    )
    add_subtitle_arguments(parser)
    add_process_arguments(parser)
    return parser


def _encoder_files(config: Config, arguments: argparse.Namespace) -> dict[str, PathLike] | None:
    """The encoders' files, where none is given the experiment's; None stands for random encoders."""
    given = {name: getattr(arguments, name) for name in ENCODERS if getattr(arguments, name)}
    if arguments.random_encoders:
        if given:
            raise UserError("--random-encoders: goes in place of --mae, --videomae, --hubert and --eva-vit")
        return None
    keeps_tokens = arguments.image_storage == "image_tokens"
    names = [] if given else list(FEATURES)
    if keeps_tokens and "eva_vit" not in given:
        names.append("eva_vit")
    given |= {name: getattr(config.weights, name) for name in names if getattr(config.weights, name)}
    check_image(arguments.image_storage, given.get("eva_vit"))
    if not given:
        raise UserError(
            "give encoders (--mae, --videomae, --hubert, --eva-vit or config.weights), or --random-encoders for a trial"
        )
    return given


def _report(path: PathLike, seconds: Mapping[str, float]) -> None:
    """What was seen and heard in all, and what took the time."""
    clip_info = read_clip_info(path)
    without = [info["name"] for info in clip_info if info.get("faces_found") == 0]
    silent = sum("sound_seconds" not in info for info in clip_info)
    wordless = sum(not info.get("subtitle") for info in clip_info)
    noted = [info["name"] for info in clip_info if info.get("notes")]
    print(
        f"no face in {len(without)} of {len(clip_info)} clips{_first(without)}, no sound in {silent}, no subtitle in "
        f"{wordless}; see {as_path(path) / CLIP_INFO_FILE}"
    )
    if noted:
        print(f"something of {len(noted)} clips could not be read{_first(noted)}: their notes there say what")
    if seconds:
        print("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()))


def _first(names: Sequence[str]) -> str:
    return f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""

"""Make MERR-style annotations of raw clips: labels, descriptions, captions."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from emollama_jax.captions.annotate import annotate
from emollama_jax.captions.annotation import AnnotateConfig, AnnotationResult, SourceClip
from emollama_jax.captions.describers import PROMPTS, Describer, chat_describers, read_prompts
from emollama_jax.captions.human_check import write_sheet
from emollama_jax.captions.mer_factory import GivenParts, read_mer_factory
from emollama_jax.captions.merr_files import write_merr_files
from emollama_jax.captions.own_model import KINDS, model_describers
from emollama_jax.captions.page import write_page
from emollama_jax.cli._arguments import VerbParser, add_config_argument, add_label_arguments, at_least, parse
from emollama_jax.cli._progress import Progress
from emollama_jax.cli._subtitles import add_subtitle_arguments, check_subtitle_arguments, transcribe_of
from emollama_jax.config import Config, MeshConfig, load_config
from emollama_jax.data.clip_files import FolderFiles
from emollama_jax.data.problems import Problem
from emollama_jax.data.tables import key_of, read_rows, read_subtitles, stem_of
from emollama_jax.errors import UserError
from emollama_jax.infer.engine import Engine
from emollama_jax.io.chat import ChatConfig
from emollama_jax.io.locks import exclusive_lock
from emollama_jax.io.paths import local_path
from emollama_jax.io.worker_pool import default_workers
from emollama_jax.media.action_units import ACTIVE
from emollama_jax.media.container import VIDEO_SUFFIXES
from emollama_jax.media.face_mesh import load_mesh
from emollama_jax.media.unit_rules import RULES, read_rules
from emollama_jax.text.labels import MERR, find_label
from emollama_jax.weights.catalogue import CATALOGUE

ENDPOINT, MODEL = "endpoint", "model"
EXPERIMENT = "stage1_merr"  # of which MiniGPT-v2 is the beginning
MESH = f"weights/{CATALOGUE['face-landmarker'].target}"


def run(argv: list[str]) -> int:
    experiment, arguments = parse(make_parser(), argv, default=load_config(EXPERIMENT))
    check_subtitle_arguments(arguments)
    if unknown := [kind for kind in arguments.describe if kind not in PROMPTS]:
        raise UserError(f"--describe: no text {unknown[0]!r}; choose among {', '.join(PROMPTS)}")
    labels = arguments.labels or MERR
    chosen = {"mesh": arguments.mesh, "person": arguments.person}
    clip = dataclasses.replace(experiment.clip, **{name: value for name, value in chosen.items() if value})
    if clip.mesh:
        load_mesh(clip.mesh)  # what is wrong with it is said now
    config = AnnotateConfig(
        rules=read_rules(arguments.rules) if arguments.rules else RULES,
        active_from=arguments.active_from,
        labels=labels,
        seed=arguments.seed,
        subtitle_sources=arguments.subtitles_from,
        subtitle_language=arguments.subtitle_language,
        clip=clip,
    )
    clips = _find_clips(arguments, labels)
    describers = _describers(arguments, experiment)
    busy = UserError(f"another process writes to {arguments.out}; wait for it, or choose another --out")
    with exclusive_lock(arguments.out / "lock", busy):
        found = annotate(
            clips,
            arguments.out,
            config,
            describers=describers,
            transcribe=transcribe_of(arguments),
            workers=arguments.workers,
            progress=_show_progress(),
        )
        written = write_merr_files(arguments.out, found.annotations)
        check = write_sheet(arguments.out, found.having("annotated"), arguments.seed)
        write_page(arguments.out, found, check, title=f"Annotations of {arguments.folder.name}")
    if check is not None:
        alpha = "" if check.alpha is None else f", Krippendorff's alpha {check.alpha:.2f}"
        print(f"scores by people: {', '.join(f'{label} {mean:.2f}' for label, mean in check.means.items())}{alpha}")
    return _report(arguments.out, found, written)


def make_parser() -> argparse.ArgumentParser:
    parser = VerbParser(
        prog="emollama annotate",
        description="Annotates the videos below a folder as MERR was made: the peak frame and a label from action "
        "units, phrases for these, the tone of the voice, the words, a coarse caption and, with a model as the "
        "describer, a description of the frame and a fine caption. Writes MERR's own files, which emollama prepare and "
        "extract read, annotations.jsonl with everything, and report.html. Clips without a label are dropped and "
        "counted. Goes on where it was stopped, and does anew only what depends on what has changed. Describers are a "
        "model behind an endpoint (EMOLLAMA_DESCRIBER_ADDRESS, EMOLLAMA_DESCRIBER_MODEL, EMOLLAMA_DESCRIBER_KEY) or "
        "MiniGPT-v2 and LLaMA in this process (--describer model). Exit code 1: a clip could not be read, or a text "
        "was not given.",
        epilog="example: emollama annotate my_videos --units openface --subtitles-from file,track --out merr",
    )
    parser.add_argument("folder", type=local_path, metavar="FOLDER", help="of videos")
    parser.add_argument("--out", type=local_path, required=True, metavar="FOLDER", help="the annotations")
    parser.add_argument(
        "--units", type=local_path, metavar="FOLDER", help="of {name}.csv by OpenFace 2, OpenFace 3 or LibreFace"
    )
    parser.add_argument(
        "--mesh",
        nargs="?",
        const=MESH,
        default="",
        metavar="FILE",
        help=f"measure blendshapes where a clip has no units, and tell faces from what is none, by MediaPipe's "
        f"face_landmarker.task (default: {MESH})",
    )
    parser.add_argument(
        "--person", type=at_least(1), default=None, metavar="N", help="of several: 1 the main one, 2 the next, ..."
    )
    parser.add_argument(
        "--label-file",
        type=local_path,
        metavar="FILE",
        help="a list or table of names and labels, which go before units",
    )
    parser.add_argument(
        "--mer-factory", type=local_path, metavar="FOLDER", help="of {name}_merr_data.json: labels, peaks, texts"
    )
    parser.add_argument("--subtitles", type=local_path, metavar="FILE", help="a table of names and what is said")
    parser.add_argument(
        "--rules", type=local_path, metavar="FILE", help="JSON: the units of each label (default: MERR's)"
    )
    parser.add_argument(
        "--active-from",
        type=float,
        default=ACTIVE,
        metavar="INTENSITY",
        help="from which a unit is active (default: %(default)s)",
    )
    parser.add_argument(
        "--describe",
        type=lambda text: tuple(text.split(",")),
        default=(),
        metavar=",".join(PROMPTS),
        help="texts that a model gives: of the peak frame, of the tone of voice, and the fine caption",
    )
    parser.add_argument("--prompts", type=local_path, metavar="FILE", help='JSON: {"picture": "...", ...}')
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="of phrases (default: %(default)s)")
    parser.add_argument(
        "--workers", type=at_least(1), default=default_workers(), metavar="N", help="default: the processors"
    )
    add_subtitle_arguments(parser)
    add_label_arguments(parser, "default: MERR's nine")
    group = parser.add_argument_group("the describer")
    group.add_argument(
        "--describer",
        choices=(ENDPOINT, MODEL),
        default=ENDPOINT,
        help=f"{ENDPOINT}, or {MODEL}: MiniGPT-v2 for the picture and its language model for the fine caption, in this "
        "process (default: %(default)s)",
    )
    group.add_argument("--base", metavar="FOLDER", help="the language model (default: weights.base)")
    group.add_argument("--trained", metavar="FILE", help="MiniGPT-v2's checkpoint (default: weights.trained)")
    group.add_argument("--eva-vit", metavar="FILE", help="the encoder of frames (default: weights.eva_vit)")
    add_config_argument(group, default=EXPERIMENT)
    return parser


def _describers(arguments: argparse.Namespace, experiment: Config) -> Mapping[str, Describer]:
    """Who gives the texts of `--describe`."""
    prompts, kinds = read_prompts(arguments.prompts), arguments.describe
    if not kinds:
        return {}
    if arguments.describer == ENDPOINT:
        return chat_describers(ChatConfig.from_environment("describer"), kinds, prompts)
    if deaf := [kind for kind in kinds if kind not in KINDS]:
        raise UserError(f"--describer {MODEL}: hears nothing; leave {deaf[0]} out of --describe")
    engine = Engine.load(
        arguments.trained,
        config=dataclasses.replace(experiment, mesh=MeshConfig()),
        base=arguments.base,
        eva_vit=arguments.eva_vit,
        inputs="frames" if "picture" in kinds else "image_tokens",
    )
    return model_describers(engine, kinds, prompts, name=Path(arguments.base or experiment.weights.base).name)


def _find_clips(arguments: argparse.Namespace, labels: Sequence[str]) -> list[SourceClip]:
    """The videos, with what is given about each.

    Raises:
        UserError: no video, a label that is unknown, or files that are about no video.
    """
    videos = FolderFiles(arguments.folder, VIDEO_SUFFIXES).named()
    if not videos:
        raise UserError(f"no video in {arguments.folder}; it should hold {', '.join(VIDEO_SUFFIXES)}")
    problems: list[Problem] = []
    labelled: dict[str, str] = {}
    if arguments.label_file:
        for row in read_rows(arguments.label_file, problems, ("name", "emotion")):
            label = find_label(row.fields.get("emotion", ""), labels, arguments.label_numbers)
            if "emotion" in row.fields and label is None:
                raise UserError(
                    f"{arguments.label_file}:{row.line}: {row.fields['emotion']!r} is none of {', '.join(labels)}; "
                    "mend it, or give other --labels"
                )
            if label is not None:
                labelled[key_of(row.fields.get("name", ""))] = label
    subtitles = read_subtitles(arguments.subtitles, problems) if arguments.subtitles else {}
    for problem in problems:
        print(f"emollama annotate: {problem}", file=sys.stderr)
    given = _read_mer_factory(arguments.mer_factory, labels) if arguments.mer_factory else {}
    units = FolderFiles(arguments.units, (".csv",))
    clips: dict[str, SourceClip] = {}
    for name, video in videos:
        clip = SourceClip(
            name=stem_of(name),
            video=video,
            units=units.select(name),
            label=labelled.get(key_of(name), ""),
            subtitle=subtitles.get(key_of(name), ""),
            given=given.get(key_of(name), GivenParts()),
        )
        if first := clips.get(clip.name):
            raise UserError(f"{first.video} and {video} have the same name; rename one of them")
        if len(clip.name.split()) != 1:
            raise UserError(f"{video}: MERR's lists can hold no name with blanks; rename it")
        clips[clip.name] = clip
    for what, path in (("units", arguments.units), ("label", arguments.label_file)):
        if path and not any(getattr(clip, what) for clip in clips.values()):
            raise UserError(f"{path} is about none of the videos in {arguments.folder}; check the names")
    return list(clips.values())


def _read_mer_factory(folder: Path, labels: Sequence[str]) -> dict[str, GivenParts]:
    """What MER-Factory says of clips, by `key_of` their names, with labels as they are written in the set."""
    found, aside = read_mer_factory(folder)
    given = {}
    for name, parts in found.items():
        label = find_label(parts.label, labels)
        if parts.label and label is None:
            aside.append(f"{name}: MER-Factory's label {parts.label!r} is none of {', '.join(labels)}; it is left out")
        given[key_of(name)] = dataclasses.replace(parts, label=label or "")
    for line in aside:
        print(f"emollama annotate: {line}", file=sys.stderr)
    return given


def _show_progress() -> Callable[[str, int, int], None]:
    """A bar or lines for each stage."""
    shown: dict[str, Progress] = {}

    def show(stage: str, done: int, total: int) -> None:
        if stage not in shown:
            shown[stage] = Progress(total, "clip", stage)
        shown[stage](1)
        if done == total:
            shown[stage].close()

    return show


def _report(out: Path, found: AnnotationResult, written: Mapping[str, int]) -> int:
    for status, counts in found.counts().items():
        if counts:
            print(f"{status} {counts.total()}: " + ", ".join(f"{what} {n}" for what, n in counts.most_common(12)))
    if silent := sorted({label for one in found.annotations for label in one.out_of_reach}):
        print(f"labels that the units of some clips can never give: {', '.join(silent)}")
    unanswered = [(kind, why) for one in found.having("annotated") for kind, why in one.unanswered.items()]
    if unanswered:
        print(f"{len(unanswered)} texts were not given, the first: {unanswered[0][0]} {unanswered[0][1]}")
    total = max(sum(found.seconds.values()), 1e-3)
    shares = ", ".join(f"{name} {100 * value / total:.0f} %" for name, value in found.seconds.items())
    speed = f"{len(found.annotations) / total:.2f} clips a second"
    print(f"{total:.1f} seconds on {default_workers()} processors, {speed}: {shares}")
    print(
        f"wrote {out} (captions: {', '.join(f'{grain} {count}' for grain, count in written.items())}); see report.html"
    )
    return 1 if unanswered or found.having("failed") else 0

"""Measure speed and memory on this machine."""

import argparse
import dataclasses
import sys
import typing
from typing import Any

from emollama_jax.bench.data import bench_data
from emollama_jax.bench.decode import bench_decode
from emollama_jax.bench.encode import bench_encode
from emollama_jax.bench.extract import bench_extract
from emollama_jax.bench.predict import bench_predict
from emollama_jax.bench.step import bench_step
from emollama_jax.bench.suite import Sizes, bench_all
from emollama_jax.bench.train import bench_train
from emollama_jax.cli._arguments import VerbParser, add_config_argument, at_least, parse
from emollama_jax.cli._serve import import_serve
from emollama_jax.config import Config
from emollama_jax.data.batch import Images
from emollama_jax.io.paths import local_path
from emollama_jax.models.layers import FLOAT_DTYPES
from emollama_jax.text.prompts import TASKS
from emollama_jax.weights.encoders import ENCODERS


def run(argv: list[str]) -> int:
    config, parsed = parse(make_parser(), argv, default=Config() if argv[:1] == ["serve"] else None)
    arguments = vars(parsed)
    bench, file = arguments.pop("bench"), arguments.pop("json")
    if file:
        file.touch()  # an unwritable place is better known before the work than after
    report = bench(config, **arguments)
    print(report)
    if file:
        report.save(file)
    return int(not getattr(report, "complete", True))


def _bench_all(config: Config, **arguments: Any) -> Any:
    """The suite; what stands for each of its sizes is an argument of its own."""
    sizes = {name: arguments.pop(name) for name in [field.name for field in dataclasses.fields(Sizes)]}
    sizes = Sizes(**{name: tuple(value) if isinstance(value, list) else value for name, value in sizes.items()})
    log = lambda line: print(line, file=sys.stderr, flush=True)
    return bench_all(config, sizes=sizes, log=log, **arguments)


def _bench_serve(config: Config, **arguments: Any) -> Any:
    """The load on a server, whose experiment is its own."""
    return import_serve("load").bench_load(**arguments)


def make_parser() -> argparse.ArgumentParser:
    measured = VerbParser(add_help=False)
    add_config_argument(measured)
    measured.add_argument(
        "--repeats", type=at_least(1), default=3, metavar="N", help="measurements (default: %(default)s)"
    )
    measured.add_argument("--no-peer", dest="with_peer", action="store_false", help="measure without the peer")
    common = VerbParser(add_help=False, parents=[measured])
    common.add_argument("--json", type=local_path, metavar="FILE", help="also write all measurements to a file")
    traced = argparse.ArgumentParser(add_help=False)
    traced.add_argument(
        "--trace", type=local_path, metavar="FOLDER", help="profile one more call, and say which operations it spent on"
    )

    parser = VerbParser(
        prog="emollama bench",
        description="Measures an experiment's language model, or its encoders, with random weights, and beside it, in "
        "the same run, the same model in torch (transformers, PEFT) where that is installed. The table shows the best "
        "of the repeats. Of a server, what many clients at once get, beside one that asks one thing after another.",
        epilog="example: emollama bench decode --config smollm2_135m --config.llama.kernel_dtype=bfloat16 --batch 1 4",
    )
    verbs = parser.add_subparsers(required=True, metavar="{all,decode,step,train,predict,encode,data,extract,serve}")
    _add_all(verbs, measured)
    decode = verbs.add_parser("decode", parents=[common, traced], help="greedy answers with a key/value cache")
    decode.set_defaults(bench=bench_decode)
    decode.add_argument(
        "--batch", dest="batch_sizes", type=at_least(1), nargs="+", default=[1, 8], metavar="B", help="default: 1 8"
    )
    decode.add_argument("--prompt", type=at_least(1), default=32, metavar="T", help="tokens (default: %(default)s)")
    decode.add_argument("--new-tokens", type=at_least(2), default=64, metavar="T", help="default: %(default)s")
    step = verbs.add_parser("step", parents=[common, traced], help="LoRA training steps")
    step.set_defaults(bench=bench_step)
    step.add_argument("--batch", type=at_least(1), default=1, metavar="B", help="rows (default: %(default)s)")
    step.add_argument(
        "--length", type=at_least(2), default=256, metavar="T", help="tokens a row (default: %(default)s)"
    )
    train = verbs.add_parser(
        "train",
        parents=[common, traced],
        help="training steps on packed clips",
        description="Whole training steps on packed clips, beside torch with one clip a row. The clips' texts are made "
        "up; image tokens are made beforehand for both, as in data prepared with --image image_tokens.",
    )
    train.set_defaults(bench=bench_train)
    train.add_argument("--steps", type=at_least(1), default=1, metavar="N", help="of a repeat (default: %(default)s)")
    train.add_argument("--clips", type=at_least(1), default=64, metavar="N", help="to draw from (default: %(default)s)")
    train.add_argument(
        "--tasks", choices=TASKS, nargs="+", default=TASKS[:2], metavar="T", help="default: emotion reason"
    )
    train.add_argument(
        "--images",
        choices=typing.get_args(Images),
        default="image_tokens",
        help="frames: encode them in the step, without the peer (default: %(default)s)",
    )
    predict = verbs.add_parser(
        "predict",
        parents=[common],
        help="labels and reasons about clips, and a mix of answers",
        description="Labels and reasons about clips, at several batch sizes, and a mix of short and long answers with "
        "continuous batching, beside lockstep batches of our own model and torch with one request at a time.",
    )
    predict.set_defaults(bench=bench_predict)
    predict.add_argument(
        "--batch",
        dest="batch_sizes",
        type=at_least(1),
        nargs="*",
        default=[1, 16],
        metavar="B",
        help="none: only the mix of answers (default: 1 16)",
    )
    predict.add_argument("--new-tokens", type=at_least(2), default=100, metavar="T", help="of a reason (default: 100)")
    predict.add_argument(
        "--longest",
        type=at_least(1),
        default=200,
        metavar="T",
        help="tokens of the mix's longest answer (default: 200)",
    )
    encode = verbs.add_parser("encode", parents=[common], help="frames, faces, clips and voices to features")
    encode.set_defaults(bench=bench_encode)
    encode.add_argument(
        "--encoders", choices=tuple(ENCODERS), nargs="+", default=tuple(ENCODERS), metavar="E", help="default: all four"
    )
    encode.add_argument(
        "--batch", dest="batch_sizes", type=at_least(1), nargs="+", default=[1], metavar="B", help="clips (default: 1)"
    )
    encode.add_argument("--seconds", type=at_least(1), default=3, metavar="S", help="of sound (default: %(default)s)")
    encode.add_argument(
        "--dtype",
        choices=FLOAT_DTYPES,
        help="of kernels and activations (default: float32 on CPUs, the experiment's elsewhere)",
    )
    data = verbs.add_parser("data", parents=[common], help="records to batches")
    data.set_defaults(bench=bench_data)
    data.add_argument("--clips", type=at_least(1), default=64, metavar="N", help="default: %(default)s")
    data.add_argument(
        "--video", type=local_path, metavar="FILE", help="every clip is a copy of it (default: synthetic clips)"
    )
    data.add_argument(
        "--workers", type=at_least(0), default=0, metavar="N", help="reading processes (default: %(default)s)"
    )
    extract = verbs.add_parser("extract", parents=[common], help="video files to records with features")
    extract.set_defaults(bench=bench_extract)
    extract.add_argument("--clips", type=at_least(1), default=16, metavar="N", help="default: %(default)s")
    extract.add_argument(
        "--videos", type=local_path, nargs="+", default=(), metavar="FILE", help="in turn (default: synthetic clips)"
    )
    extract.add_argument(
        "--workers", type=at_least(0), metavar="N", help="reading processes (default: the processors but one)"
    )
    extract.add_argument("--batch", dest="batch_size", type=at_least(1), default=32, metavar="B", help="images")
    extract.add_argument("--dtype", choices=FLOAT_DTYPES, help="as for encode")
    serve = verbs.add_parser(
        "serve",
        help="a load on a running emollama serve",
        description="Many clients at once, with mixed clips and questions, beside one that asks one thing after\n"
        "another. Every answer has to be the one that is given alone.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.set_defaults(bench=_bench_serve)
    serve.add_argument("--server", required=True, metavar="URL", help="the server's address")
    serve.add_argument("--clients", type=at_least(1), default=64, metavar="N", help="default: %(default)s")
    serve.add_argument("--seconds", type=at_least(1), default=120, metavar="S", help="default: %(default)s")
    serve.add_argument(
        "--videos", type=local_path, nargs="+", default=(), metavar="FILE", help="default: synthetic clips"
    )
    serve.add_argument("--api-key", dest="key", default="", metavar="KEY", help="that the server asks for")
    serve.add_argument("--json", type=local_path, metavar="FILE", help="also write all measurements to a file")
    return parser


def _add_all(verbs: Any, measured: argparse.ArgumentParser) -> None:
    """The suite, whose results go to a folder."""
    sizes = Sizes()
    add = verbs.add_parser(
        "all",
        parents=[measured],
        help="one device in one call: steps, decoding and the frame's encoder",
        description="Measures training steps on packed clips (with the experiment's kernels, int8 kernels, XLA's\n"
        "attention, and the frame's encoder in the loop), decoding, and the encoder, the most important first, each\n"
        "in a process of its own, and prints one table: every row beside its limit, its goal and torch. A row that\n"
        "cannot be measured says why. FOLDER holds the table after every row, as all.md and all.json, and profiles of\n"
        "the first step and the first answers. Exits with 1 where a row was not measured.",
        epilog="example: emollama bench all --config stage1_h200_1 --out h200",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add.set_defaults(bench=_bench_all, json=None)
    add.add_argument("--out", type=local_path, required=True, metavar="FOLDER", help="of the results")
    add.add_argument("--rows", nargs="+", default=(), metavar="ROW", help="measure these alone (default: all)")
    add.add_argument(
        "--budget",
        type=at_least(1),
        default=600,
        metavar="SECONDS",
        help="for all rows; what is left then is not run (default: %(default)s)",
    )
    several = {"type": at_least(1), "nargs": "+", "metavar": "N"}
    add.add_argument(
        "--lengths", **several, default=list(sizes.lengths), help="tokens of a packed row (default: 4096 2048)"
    )
    add.add_argument(
        "--tokens", type=at_least(1), default=sizes.tokens, metavar="N", help="of a step (default: %(default)s)"
    )
    add.add_argument(
        "--batch", dest="batch_sizes", **several, default=list(sizes.batch_sizes), help="of decoding (default: 1 128)"
    )
    add.add_argument("--prompt", type=at_least(1), default=sizes.prompt, metavar="T", help="default: %(default)s")
    add.add_argument(
        "--new-tokens", type=at_least(2), default=sizes.new_tokens, metavar="T", help="default: %(default)s"
    )
    add.add_argument(
        "--frames", type=at_least(1), default=sizes.frames, metavar="B", help="of the encoder (default: %(default)s)"
    )
    add.add_argument(
        "--steps", type=at_least(1), default=sizes.steps, metavar="N", help="of a repeat (default: %(default)s)"
    )
    add.add_argument("--clips", type=at_least(1), default=sizes.clips, metavar="N", help="as for train")

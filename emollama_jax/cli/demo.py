"""Ask about clips on a page in the browser."""

import argparse

from emollama_jax.cli._arguments import VerbParser, at_least
from emollama_jax.cli._model import read_experiment
from emollama_jax.cli._serve import (
    add_engine_arguments,
    check_engine_arguments,
    import_serve,
    load_engine,
    log,
    make_settings,
)
from emollama_jax.errors import UserError


def run(argv: list[str]) -> int:
    config, arguments = read_experiment(make_parser(), argv)
    config = check_engine_arguments(arguments, config)
    if arguments.share and not (arguments.auth or arguments.insecure):
        raise UserError("--share: everybody with the address reaches the page; give --auth, or --insecure")
    mount = import_serve("demo.mount")
    server = import_serve("server")
    settings = make_settings(arguments, api_key=arguments.auth[1] if arguments.auth else "")
    server.bind(settings).close()  # a taken address is known before the model is loaded
    engine = load_engine(config, arguments)
    return mount.run_demo(engine, settings, auth=arguments.auth, share=arguments.share, log=log)


def make_parser() -> argparse.ArgumentParser:
    parser = VerbParser(
        prog="emollama demo",
        usage="emollama demo --trained RUN [--port PORT] [--auth USER:PASSWORD] [...]",
        description="Serves a page: a clip is uploaded or recorded, and asked for its emotion, the reasons, or by a\n"
        "question of one's own; beside the answer it shows what the model saw. `emollama serve` has it, too, at /.",
        epilog="example: emollama demo --trained runs/stage2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser.add_argument_group("who is served")
    group.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: %(default)s)")
    group.add_argument("--port", type=at_least(1), default=7860, help="default: %(default)s")
    group.add_argument("--auth", type=_user_and_password, metavar="USER:PASSWORD", help="that visitors give")
    group.add_argument(
        "--share", action="store_true", help="also at a public address, through a tunnel that gradio sets up"
    )
    group.add_argument("--insecure", action="store_true", help="let others reach the page without --auth")
    add_engine_arguments(parser)
    return parser


def _user_and_password(text: str) -> tuple[str, str]:
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise argparse.ArgumentTypeError(f"{text!r} is not USER:PASSWORD")
    return user, password

"""Answer questions about clips over HTTP, and in the browser."""

import argparse
import os

from emollama_jax.cli._arguments import VerbParser, at_least
from emollama_jax.cli._model import read_experiment
from emollama_jax.cli._serve import (
    KEY,
    add_engine_arguments,
    check_engine_arguments,
    import_serve,
    load_engine,
    log,
    make_settings,
    seconds,
)
from emollama_jax.errors import UserError
from emollama_jax.io.paths import local_path

EXIT_CODES = """exit codes:
  0    ended by a signal, with the requests under way answered
  1    the engine failed while it served: start the server again
  2    arguments that do not fit, or an address that is taken
  3    the model could not start"""


def run(argv: list[str]) -> int:
    config, arguments = read_experiment(make_parser(), argv)
    config = check_engine_arguments(arguments, config)
    if arguments.ssl_keyfile and not arguments.ssl_certfile:
        raise UserError("--ssl-keyfile: goes with --ssl-certfile")
    if arguments.allowed_media_domains and arguments.fetch == "off":
        raise UserError("--allowed-media-domains: goes with --fetch allow")
    server = import_serve("server")
    settings = make_settings(
        arguments,
        api_key=arguments.api_key if arguments.api_key is not None else os.environ.get(KEY, ""),
        fetch=arguments.fetch == "allow",
        allowed_media_domains=arguments.allowed_media_domains,
        allowed_media_path=arguments.allowed_media_path,
        drain_seconds=arguments.drain_seconds,
        cors_origins=arguments.cors_origins,
        **({"model_name": arguments.model_name} if arguments.model_name else {}),
    )
    add_demo = import_serve("demo.mount").mount_demo if arguments.demo else None
    bound = server.bind(settings)
    with bound:
        engine = load_engine(config, arguments)
        certificate = (arguments.ssl_certfile, arguments.ssl_keyfile) if arguments.ssl_certfile else None
        return server.run_server(engine, settings, bound, certificate=certificate, add_demo=add_demo, log=log)


def make_parser() -> argparse.ArgumentParser:
    parser = VerbParser(
        prog="emollama serve",
        usage="emollama serve --trained RUN [--port PORT] [--api-key KEY] [...]",
        description="Answers questions about clips: POST /v1/emotions gives the record of emollama predict, POST\n"
        "/v1/chat/completions is OpenAI's protocol with video, sound and pictures. The demo is at /, the API\n"
        "is described at /docs, and /health, /ready, /metrics and /version say how the server is.",
        epilog=f"example: emollama serve --trained runs/stage2\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser.add_argument_group("who is served")
    group.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: %(default)s)")
    group.add_argument("--port", type=at_least(0), default=8000, help="0 takes a free one (default: %(default)s)")
    group.add_argument("--api-key", metavar="KEY", help=f"that clients give as a bearer token (default: ${KEY})")
    group.add_argument("--insecure", action="store_true", help="serve an address that others reach without a key")
    group.add_argument("--ssl-certfile", type=local_path, metavar="FILE", help="for https, in PEM")
    group.add_argument("--ssl-keyfile", type=local_path, metavar="FILE", help="its key, where it is another file")
    group.add_argument(
        "--cors-origins", type=names, default=(), metavar="ORIGINS", help="of pages that may ask, separated by commas"
    )
    group.add_argument("--model-name", default="", metavar="NAME", help="for clients (default: that of --trained)")
    group.add_argument(
        "--demo", action=argparse.BooleanOptionalAction, default=True, help="the page in the browser (default: yes)"
    )
    group.add_argument(
        "--drain-seconds", type=seconds, default=25.0, metavar="S", help="for requests under way (default: 25)"
    )
    group = parser.add_argument_group("where clips may come from, beside the request itself")
    group.add_argument("--fetch", choices=("off", "allow"), default="off", help="https addresses (default: off)")
    group.add_argument(
        "--allowed-media-domains", type=names, default=(), metavar="HOSTS", help="the only ones, separated by commas"
    )
    group.add_argument("--allowed-media-path", type=local_path, metavar="FOLDER", help="below which file: URLs lead")
    add_engine_arguments(parser)
    return parser


def names(text: str) -> tuple[str, ...]:
    """An argument's type: names separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())

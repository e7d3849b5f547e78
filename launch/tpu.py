"""Runs a command on a Cloud TPU pod, through preemptions: `python launch/tpu.py VERB --name N --zone Z --bucket gs://B`.

    python launch/tpu.py run --name stage1 --type v5e-16 --zone us-west4-a --bucket gs://mine --spot -- \\
        emollama train --config stage1_v5e_16 --config.train.workdir=gs://mine/runs/stage1 ...

up      builds the wheel, copies it with constraints, configuration and command into the bucket, asks for the slices
run     the same, or the new command on slices that are there; then watches
watch   until the run has ended: creates again what was taken away, starts again what stands still
status  one line
logs    what a process printed
ssh     a shell on a machine, or a command on all: ssh ... -- uptime
stop    saves and ends the run; the slices stay
down    deletes the slices; what is in the bucket stays

The exit code of run and watch is the run's, 1 where it was given up. Needs Python and gcloud, nothing else.
"""

import argparse
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tpu_cloud import HERE, STARTUP, Cloud, CloudError, Launch, build_wheel
from tpu_types import TypeNameError
from tpu_watch import STOP, Watch

VERBS = ("up", "run", "watch", "status", "logs", "ssh", "stop", "down")
ON_THE_MACHINES = "/opt/emollama/job"  # where tpu_startup.sh puts the job's folder
START = "gcloud storage cat {job}/tpu_startup.sh | sudo EMOLLAMA_JOB={job} bash"


class UsageError(Exception):
    """Arguments that do not fit, or a launch in another state than the verb needs."""


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    at = argv.index("--") if "--" in argv else len(argv)
    arguments = make_parser().parse_args(argv[:at])
    try:
        return run(arguments, tuple(argv[at + 1 :]))
    except (UsageError, TypeNameError) as error:
        print(f"tpu.py: error: {error}", file=sys.stderr)
        return 2
    except CloudError as error:
        print(f"tpu.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        after = f"; the run goes on, and `watch --name={arguments.name}` looks on" if arguments.verb != "up" else ""
        print(f"tpu.py: interrupted{after}", file=sys.stderr)
        return 130


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tpu.py",
        usage="tpu.py VERB --name N --zone Z --bucket gs://B [...] [-- COMMAND ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("verb", choices=VERBS, metavar="VERB", help="see above")
    add("--name", type=_name, required=True, help="of the launch, its slices and its folder in the bucket")
    add("--zone", required=True, help="such as us-west4-a")
    add("--bucket", type=_bucket, required=True, metavar="gs://B", help="or a folder in it; jobs/NAME is made there")
    add("--project", default="", help="default: gcloud's")
    add("--type", default="", help="v5e-16, v6e-16, v5p-16 (cores: 8 chips), ...")
    add("--slices", type=int, default=1, metavar="N", help="default: 1")
    capacity = parser.add_mutually_exclusive_group()
    for name in ("spot", "reserved", "on-demand"):
        what = " (default)" if name == "spot" else ""
        capacity.add_argument(f"--{name}", dest="capacity", action="store_const", const=name, help=f"capacity{what}")
    add("--network", default="", help="default: the project's default network")
    add("--service-account", default="", metavar="EMAIL", help="of the machines; it needs the bucket")
    add("--internal-ips", action="store_true", help="no public addresses; the network needs a NAT to install from")
    add("--env", type=_setting, action="append", default=[], metavar="K=V", help="in the run's environment")
    add("--extras", default="tpu,gcs", metavar="A,B", help="of the package (default: %(default)s)")
    add("--wheel", type=Path, metavar="FILE", help="take this wheel; default: build this repository's")
    add("--retries", type=int, default=20, metavar="N", help="creations in a row without a new step; -1: any number")
    add("--stall-minutes", type=float, default=30, metavar="N", help="without a new step, then start again (30)")
    add("--poll", type=float, default=60, metavar="SECONDS", help="between two looks (60)")
    add("--delete-when-done", action="store_true", help="delete the slices when the run has ended, well or not")
    add("--process", default="0", metavar="I", help="for logs and ssh: which one (0)")
    add("--dry-run", action="store_true", help="print every command that would run")
    return parser


def run(arguments: argparse.Namespace, command: tuple[str, ...]) -> int:
    verb = arguments.verb
    starts = verb in ("up", "run")
    if starts and not (arguments.type and command):
        raise UsageError(f"{verb} needs --type and a command: {verb} ... --type=v5e-16 -- emollama train --config X")
    if command and not starts and verb != "ssh":
        raise UsageError(f"{verb} takes no command")
    given = Launch(
        **{name: getattr(arguments, name) for name in ("name", "zone", "bucket", "type", "slices", "project")},
        **{name: getattr(arguments, name) for name in ("network", "service_account", "internal_ips", "extras")},
        capacity=arguments.capacity or "spot",
        env=dict(arguments.env),
        command=command if starts else (),
    )
    cloud = Cloud(given, dry_run=arguments.dry_run)
    if starts:
        given.slice  # noqa: B018  (raises for a slice that there is not)
        return _start(cloud, arguments)
    if verb == "down":
        was_there = cloud.delete()
        if not arguments.dry_run:
            _log("deleted" if was_there else "nothing to delete")
        return 0
    if verb == "logs":
        cloud.run("gcloud", "storage", "cat", f"{given.job}/logs/process-{arguments.process}.log", to_terminal=True)
        return 0
    launch = given if arguments.dry_run else Launch.from_json(cloud.read("launch.json"))
    cloud = Cloud(launch, dry_run=arguments.dry_run)
    if verb == "ssh" and not command:
        cloud.ssh(launch.nodes[0], worker=arguments.process)
    elif verb == "ssh":
        print("".join(cloud.ssh(node, command=shlex.join(command)) for node in launch.nodes), end="")
    elif verb == "stop":
        cloud.ssh_everywhere(STOP)
        if not arguments.dry_run:
            _log("saved and ended; `run` goes on, `down` deletes the slices")
    else:
        return _watch(cloud, arguments, once=verb == "status")
    return 0


def _start(cloud: Cloud, arguments: argparse.Namespace) -> int:
    launch = cloud.launch
    found = cloud.find()
    state = found["state"]["state"] if found else ""
    if state and arguments.verb == "up":
        raise UsageError(f"{launch.name} is there already ({state}); `run` gives it a command, `down` deletes it")
    if found:
        _check_same(launch, found)
    with tempfile.TemporaryDirectory() as folder:
        _upload(cloud, arguments.wheel, Path(folder))
    if not state:
        cloud.create()
    elif state == "ACTIVE":
        cloud.ssh_everywhere(START.format(job=shlex.quote(launch.job)))
    return _watch(cloud, arguments) if arguments.verb == "run" else 0


def _check_same(launch: Launch, found: dict) -> None:
    """Raises UsageError where the slices that are there are others."""
    nodes = found.get("tpu", {}).get("nodeSpec", [])
    kinds = {node.get("node", {}).get("acceleratorType", "") for node in nodes}
    if kinds - {launch.slice.accelerator_type}:
        raise UsageError(f"{launch.name} is a {', '.join(kinds)}; take another --name, or `down` first")


def _upload(cloud: Cloud, wheel: Path | None, folder: Path) -> None:
    """Puts into the bucket all that the machines need."""
    launch = cloud.launch
    command, configs = _take_configs(launch.command)
    if wheel is None:
        wheel = build_wheel(cloud, HERE.parent, folder)
    elif not wheel.is_file():
        raise UsageError(f"--wheel {wheel}: no such file")
    texts = {"launch.json": launch.to_json(), "command.sh": _script(launch, command), "extras": launch.extras + "\n"}
    for name, text in texts.items():
        (folder / name).write_text(text)
    files = [wheel, HERE.parent / "constraints.txt", STARTUP, *(folder / name for name in texts), *configs]
    cloud.forget("state/*")  # of a launch before
    cloud.forget("*.whl")
    cloud.upload([str(file) for file in files])


def _take_configs(command: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Returns the command with configuration files as they are on the machines, and these files.

    A file of ./configs by its name is taken along, too: the package knows only its own.
    """
    words, files = list(command), []
    for i, word in enumerate(words):
        flag, equals, name = word.partition("=")
        if flag != "--config" or not (equals or i + 1 < len(words)):
            continue
        name = name if equals else words[i + 1]
        local = Path("configs", f"{name}.py")
        file = str(local) if "/" not in name and local.is_file() else name
        if not file.endswith(".py"):
            continue
        if not (file.startswith("gs://") or Path(file).is_file()):
            raise UsageError(f"--config {name}: no such file")
        files.append(file)
        there = f"{ON_THE_MACHINES}/{Path(file).name}"
        words[i : i + 1 + (not equals)] = [f"--config={there}"] if equals else ["--config", there]
    return words, files


def _script(launch: Launch, command: Sequence[str]) -> str:
    """Returns what each machine runs: the checks, then the command."""
    settings = {"EMOLLAMA_HEARTBEAT": f"{launch.job}/state/heartbeat.json"}
    settings["JAX_COMPILATION_CACHE_DIR"] = f"{launch.bucket.rstrip('/')}/compiled"
    lines = [f"export {name}={shlex.quote(value)}" for name, value in (settings | launch.env).items()]
    if command[0] == "emollama":
        checked = command[2:] if command[1:2] == ["train"] else []
        lines.append(f"{shlex.join(['emollama', 'doctor', *checked])} || exit")
    return "\n".join([*lines, f"exec {shlex.join(command)}", ""])


def _watch(cloud: Cloud, arguments: argparse.Namespace, *, once: bool = False) -> int:
    if arguments.dry_run:
        _print_watch(cloud, arguments)
        return 0
    watch = Watch(
        cloud,
        retries=arguments.retries,
        stall_s=60 * arguments.stall_minutes,
        poll_s=arguments.poll,
        log=_log,
    )
    if once:
        watch.look()
        return 0
    code = watch.run()
    if arguments.delete_when_done:
        cloud.delete()
        _log("deleted")
    return code


def _print_watch(cloud: Cloud, arguments: argparse.Namespace) -> None:
    """Prints what a watch runs."""
    print("# every --poll seconds")
    cloud.find()
    cloud.read("state/*.json")
    if arguments.verb == "status":
        return
    print("# SUSPENDED or FAILED")
    cloud.delete()
    cloud.forget("state/process-*")
    if cloud.launch.type:
        cloud.create()
    print("# no new step for --stall-minutes")
    Watch.restart(cloud)
    print("# at the end")
    cloud.write("spells.json", "")
    if arguments.delete_when_done:
        cloud.delete()


def _log(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)


def _name(text: str) -> str:
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", text):
        raise argparse.ArgumentTypeError(f"{text!r}: up to 40 of a-z, 0-9 and -, beginning with a letter")
    return text


def _bucket(text: str) -> str:
    if not re.fullmatch(r"gs://[a-z0-9][-._a-z0-9]+(/\S*)?", text):
        raise argparse.ArgumentTypeError(f"{text!r}: write gs://BUCKET or gs://BUCKET/FOLDER")
    return text


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=VALUE")
    return name, value


if __name__ == "__main__":
    sys.exit(main())

"""Renders a run on GKE as a JobSet: `python launch/gke.py --name N --type v5e-16 --image I -- emollama train ...`.

    python launch/gke.py --name=stage1 --type=v5e-16 --image=REGION-docker.pkg.dev/P/R/emollama:1 --bucket=gs://mine \\
        -- emollama train --config stage1_v5e_16 ... | kubectl apply -f -

YAML goes to standard output, headed by the same for xpk; `--apply` gives it to kubectl. The cluster needs JobSet 0.10
or newer. All machines start again together, from the newest checkpoint: without being counted where one was taken away
or asked to end (75), at most `--restarts` times after what may pass, never after what a person has to mend (1, 2, 4).
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tpu_types import CHIPS_A_VM, Slice, TypeNameError, parse_type

CONFIG_FOLDER = "/etc/emollama"
SELECTOR = "cloud.google.com/gke-"


class UsageError(Exception):
    """Arguments that do not fit."""


@dataclass(frozen=True)
class Job:
    """What is rendered."""

    name: str
    slice: Slice
    image: str
    command: tuple[str, ...]
    slices: int = 1
    namespace: str = "default"
    queue: str = ""
    service_account: str = ""
    capacity: str = "on-demand"
    restarts: int = 20
    bucket: str = ""
    env: dict[str, str] = field(default_factory=dict)


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    at = argv.index("--") if "--" in argv else len(argv)
    arguments = make_parser().parse_args(argv[:at])
    try:
        return run(arguments, tuple(argv[at + 1 :]))
    except (UsageError, TypeNameError) as error:
        print(f"gke.py: error: {error}", file=sys.stderr)
        return 2


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gke.py",
        usage="gke.py --name N --type v5e-16 --image I [...] -- COMMAND ...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--name", type=_name, required=True, help="of the JobSet")
    add("--type", required=True, help="v5e-16, v6e-16, v5p-16 (cores: 8 chips), ...")
    add("--image", required=True, help="made from launch/Dockerfile")
    add("--slices", type=int, default=1, metavar="N", help="default: 1")
    add("--namespace", default="default", help="default: %(default)s")
    add("--queue", default="", help="a local queue of Kueue")
    add("--service-account", default="", help="of Kubernetes, which may use the bucket")
    add("--spot", dest="capacity", action="store_const", const="spot", default="on-demand", help="on spot nodes")
    add("--restarts", type=int, default=20, metavar="N", help="after what may pass (default: %(default)s)")
    add("--bucket", default="", metavar="gs://B", help="for the heartbeat, jobs/NAME, and compiled programs")
    add("--env", action="append", default=[], metavar="K=V", help="in the run's environment")
    add("--apply", action="store_true", help="give it to kubectl")
    return parser


def run(arguments: argparse.Namespace, command: tuple[str, ...]) -> int:
    if not command:
        raise UsageError("give a command after --, such as: -- emollama train --config stage1_v5e_16")
    if wrong := [pair for pair in arguments.env if not re.match(r"[A-Za-z_]\w*=", pair)]:
        raise UsageError(f"--env {wrong[0]}: write NAME=VALUE")
    names = ("name", "image", "slices", "namespace", "queue", "service_account", "capacity", "restarts", "bucket")
    command, config = _take_config(command)
    job = Job(
        slice=parse_type(arguments.type),
        command=command,
        env=dict(pair.split("=", 1) for pair in arguments.env),
        **{name: getattr(arguments, name) for name in names},
    )
    text = render(job, config)
    if not arguments.apply:
        print(text, end="")
        return 0
    try:
        return subprocess.run(["kubectl", "apply", "-f", "-"], input=text, text=True).returncode
    except FileNotFoundError as error:
        raise UsageError("--apply needs kubectl on the PATH") from error


def render(job: Job, config: Path | None = None) -> str:
    """Returns the manifests as YAML: of the configuration file, if there is one, and of the JobSet."""
    manifests = [_config_map(job, config)] if config else []
    manifests.append(_job_set(job, config))
    xpk = ["uvx", "xpk", "workload", "create", "--cluster=CLUSTER", f"--workload={job.name}"]
    xpk += [f"--tpu-type={job.slice.accelerator_type}", f"--num-slices={job.slices}", f"--docker-image={job.image}"]
    xpk += [f"--max-restarts={job.restarts}", "--restart-on-exit-codes=75,3,134", f"--command={_script(job)}"]
    head = f"# On a cluster that xpk made, instead of this:\n#   {shlex.join(xpk)}\n"
    return head + "---\n".join(to_yaml(manifest) for manifest in manifests)


def _take_config(command: tuple[str, ...]) -> tuple[tuple[str, ...], Path | None]:
    """Returns the command with a configuration file as the pods see it, and that file."""
    words = list(command)
    for i, word in enumerate(words):
        flag, equals, name = word.partition("=")
        name = name if equals else " ".join(words[i + 1 : i + 2])
        if flag != "--config" or not name.endswith(".py"):
            continue
        if not Path(name).is_file():
            raise UsageError(f"--config {name}: no such file")
        words[i : i + 1 + (not equals)] = [f"--config={CONFIG_FOLDER}/{Path(name).name}"]
        return tuple(words), Path(name)
    return command, None


def _script(job: Job) -> str:
    """Returns the shell command of a pod: the checks, then the run."""
    command = list(job.command)
    if command[:2] in (["emollama", "train"], ["emollama", "extract"]) and "--pod" not in command:
        command.append("--pod")
    if command[:2] == ["emollama", "train"]:
        return f"{shlex.join(['emollama', 'doctor', *command[2:]])} && exec {shlex.join(command)}"
    return f"exec {shlex.join(command)}"


def _config_map(job: Job, config: Path) -> dict[str, Any]:
    metadata = {"name": f"{job.name}-config", "namespace": job.namespace}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {config.name: config.read_text()}}


def _job_set(job: Job, config: Path | None) -> dict[str, Any]:
    # Which rule of podFailurePolicy a Job failed by is told in its message alone.
    uncounted, for_a_person = r"matching FailJob rule at index [01]$", r"matching FailJob rule at index 2$"
    rule = lambda action, pattern: {
        "action": action,
        "onJobFailureReasons": ["PodFailurePolicy"],
        "onJobFailureMessagePatterns": [pattern],
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": job.name,
            "namespace": job.namespace,
            **({"labels": {"kueue.x-k8s.io/queue-name": job.queue}} if job.queue else {}),
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": job.restarts,
                "rules": [
                    {"name": "disrupted"} | rule("RestartJobSetAndIgnoreMaxRestarts", uncounted),
                    {"name": "needs-a-person"} | rule("FailJobSet", for_a_person),
                ],
            },
            "replicatedJobs": [
                {"name": "slice", "replicas": job.slices, "template": {"spec": _inner_job(job, config)}},
            ],
        },
    }


def _inner_job(job: Job, config: Path | None) -> dict[str, Any]:
    on_codes = lambda *codes: {
        "action": "FailJob",
        "onExitCodes": {"containerName": "emollama", "operator": "In", "values": list(codes)},
    }
    return {
        "parallelism": job.slice.vms,
        "completions": job.slice.vms,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                on_codes(75),
                on_codes(1, 2, 4),
            ]
        },
        "template": {"spec": _pod(job, config)},
    }


def _pod(job: Job, config: Path | None) -> dict[str, Any]:
    bucket = job.bucket.rstrip("/")
    settings = {
        "EMOLLAMA_HEARTBEAT": f"{bucket}/jobs/{job.name}/state/heartbeat.json",
        "JAX_COMPILATION_CACHE_DIR": f"{bucket}/compiled",
    }
    settings = (settings if bucket else {}) | job.env
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]  # 64 MB otherwise
    if config:
        volumes.append({"name": "config", "configMap": {"name": f"{job.name}-config"}})
        mounts.append({"name": "config", "mountPath": CONFIG_FOLDER})
    container = {
        "name": "emollama",
        "image": job.image,
        "command": ["/bin/bash", "-c", _script(job)],
        **({"env": [{"name": name, "value": value} for name, value in settings.items()]} if settings else {}),
        "resources": {"limits": {"google.com/tpu": CHIPS_A_VM}},
        "volumeMounts": mounts,
    }
    kind = job.slice.kind
    selector = {f"{SELECTOR}tpu-accelerator": kind.gke_accelerator, f"{SELECTOR}tpu-topology": job.slice.topology}
    if job.capacity == "spot":
        selector[f"{SELECTOR}spot"] = "true"
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 120,  # to save in; a spot node leaves 15 s
        **({"serviceAccountName": job.service_account} if job.service_account else {}),
        "nodeSelector": selector,
        "tolerations": [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}],
        "containers": [container],
        "volumes": volumes,
    }


def to_yaml(value: Any, indent: int = 0) -> str:
    """Returns mappings and lists in YAML's block style, whole lines as they are, and anything else as JSON,
    which YAML reads, too."""
    pad, lines = "  " * indent, []
    if isinstance(value, dict):
        for key, item in value.items():
            if isinstance(item, dict | list) and item:
                lines.append(f"{pad}{key}:\n{to_yaml(item, indent + 1)}")
            elif isinstance(item, str) and item.endswith("\n"):
                text = "".join(f"{pad}  {line}" if line.strip() else "\n" for line in item.splitlines(keepends=True))
                lines.append(f"{pad}{key}: |\n{text}")
            else:
                lines.append(f"{pad}{key}: {_scalar(item)}\n")
        return "".join(lines)
    for item in value:
        text = to_yaml(item, indent + 1) if isinstance(item, dict) else f"{pad}  {_scalar(item)}\n"
        lines.append(f"{pad}- {text[len(pad) + 2 :]}")
    return "".join(lines)


def _scalar(value: Any) -> str:
    words = ("true", "false", "null", "yes", "no", "on", "off", "y", "n")  # which YAML takes for something else
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z/][-\w./]*", value) and value.lower() not in words
    return value if plain else json.dumps(value)


def _name(text: str) -> str:
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", text):
        raise argparse.ArgumentTypeError(f"{text!r}: up to 40 of a-z, 0-9 and -, beginning with a letter")
    return text


if __name__ == "__main__":
    sys.exit(main())

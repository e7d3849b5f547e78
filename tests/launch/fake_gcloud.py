"""gcloud without a cloud: queued resources whose states change as they are asked for, and a bucket that is a folder.

$FAKE_CLOUD is a folder with `scenario.json`; it gets `state.json`, `bucket/` and, line by line, `transcript`. Arguments
are checked as gcloud checks them. What the machines of an active slice would do happens between two looks: they train
`pace` steps, save every `save_every`, and tell of it in the bucket.
"""

import argparse
import fnmatch
import json
import os
import shlex
import sys
import time
from pathlib import Path

CLOUD = Path(os.environ["FAKE_CLOUD"])
BUCKET = CLOUD / "bucket"
SCENARIO = {
    "steps": 20,
    "pace": 3,  # steps between two looks
    "save_every": 2,
    "processes": 4,
    "preempt_at": [],  # steps
    "fail_at": [],  # steps at which Cloud TPU gives the slices up
    "stall_at": None,  # a step
    "installs_for": 0,  # looks, each time that the machines start
    "end_at": None,  # [step, exit code]
    "refused": [],  # the numbers of the creations that are refused, from 1
    "ssh_fails": 0,  # how often one worker cannot be reached
    "looks_fail": [],  # the numbers of the looks at the state that fail, from 1
    "existing": None,  # a state that the resource is in as the scenario begins
} | json.loads((CLOUD / "scenario.json").read_text())
STATES = ["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
FLAGS = {  # of each command: those with a value, then those without
    ("compute", "tpus", "queued-resources", "create"): (
        "zone project node-id node-count node-prefix accelerator-type runtime-version metadata metadata-from-file "
        "service-account scopes network subnetwork labels valid-until-duration",
        "spot guaranteed reserved internal-ips async quiet",
    ),
    ("compute", "tpus", "queued-resources", "describe"): ("zone project format", "quiet"),
    ("compute", "tpus", "queued-resources", "delete"): ("zone project", "force async quiet"),
    ("compute", "tpus", "tpu-vm", "ssh"): ("zone project worker command output-directory", "internal-ip quiet"),
    ("storage", "cat"): ("range", "quiet"),
    ("storage", "cp"): ("", "recursive quiet"),
    ("storage", "rm"): ("", "recursive quiet"),
}
STATE = CLOUD / "state.json"
state = {"at": -1, "type": "", "creations": 0, "step": 0, "saved": 0, "reached": 0, "ssh": 0, "looks": 0, "lost": ""}
state |= {"stuck": False, "stalled": False, "installed_for": 0, "booted": int(time.time()) - 900}


def main() -> int:
    with (CLOUD / "transcript").open("a") as transcript:
        transcript.write(f"$ {shlex.join(['gcloud', *sys.argv[1:]])}\n")
    if STATE.exists():
        state.update(json.loads(STATE.read_text()))
    elif SCENARIO["existing"]:
        state.update(at=STATES.index(SCENARIO["existing"]), type="v5litepod-16", creations=1)
    command = next((known for known in FLAGS if tuple(sys.argv[1 : 1 + len(known)]) == known), None)
    if command is None:
        fail("gcloud", f"Invalid choice: {sys.argv[1:4]}")
    values, switches = FLAGS[command]
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    parser.add_argument("names", nargs="+")
    for flag in values.split():
        parser.add_argument(f"--{flag}", action="append")
    for flag in switches.split():
        parser.add_argument(f"--{flag}", action="store_true")
    arguments = parser.parse_args(sys.argv[1 + len(command) :])
    where = "gcloud." + ".".join(command)
    if command[0] == "compute" and not arguments.zone:
        fail(where, "argument --zone: Must be specified.")
    globals()[command[-1]](arguments, where)
    STATE.write_text(json.dumps(state))
    return 0


def fail(where: str, message: str) -> None:
    STATE.write_text(json.dumps(state))
    print(f"ERROR: ({where}) {message}", file=sys.stderr)
    sys.exit(1)


def check_there(where: str, name: str) -> None:
    if state["at"] < 0:
        fail(where, f"NOT_FOUND: Resource 'projects/p/locations/z/queuedResources/{name}' was not found.")


def create(arguments, where):
    given = [bool(arguments.node_id), bool(arguments.node_count)]
    if sum(given) != 1:
        fail(where, "Exactly one of (--node-id | --node-count --node-prefix) must be specified.")
    if not arguments.accelerator_type or not arguments.runtime_version:
        fail(where, "argument --accelerator-type --runtime-version: Must be specified.")
    for pair in arguments.metadata_from_file or []:
        assert Path(pair.partition("=")[2]).is_file(), pair
    if state["at"] >= 0:
        fail(where, "ALREADY_EXISTS: Resource is there already.")
    state["creations"] += 1
    if state["creations"] in SCENARIO["refused"]:
        fail(where, "RESOURCE_EXHAUSTED: Quota limit 'TPUV5sLitepodPerProjectPerZone' has been exceeded. Limit: 0.")
    state.update(at=0, type=arguments.accelerator_type[0], step=state["saved"], lost="", stuck=False, installed_for=0)
    state["booted"] = int(time.time()) - 900 * state["creations"]  # a quarter of an hour longer each time


def delete(arguments, where):
    check_there(where, arguments.names[0])
    state["at"] = -1


def describe(arguments, where):
    state["looks"] += 1
    if state["looks"] in SCENARIO["looks_fail"]:
        fail(where, "There was a problem refreshing your current auth tokens: Unable to find the server.")
    check_there(where, arguments.names[0])
    name = state["lost"] or STATES[state["at"]]
    found = {"name": arguments.names[0], "state": {"state": name}}
    if name == "FAILED":
        found["state"]["failedData"] = {"error": {"code": 13, "message": "an internal error occurred"}}
    found["tpu"] = {"nodeSpec": [{"node": {"acceleratorType": state["type"]}}]}
    print(json.dumps(found))
    if name == "ACTIVE":
        work()
    elif not state["lost"]:
        state["at"] += 1


def work():
    """What the machines do until the next look."""
    if state["installed_for"] < SCENARIO["installs_for"]:
        state["installed_for"] += 1
        for number in range(SCENARIO["processes"]):
            tell_process(number, "installing")
        return
    before, state["step"] = state["step"], min(state["step"] + SCENARIO["pace"], SCENARIO["steps"])
    if SCENARIO["stall_at"] and not state["stalled"] and state["step"] >= SCENARIO["stall_at"]:
        state.update(stuck=True, stalled=True)
    if state["stuck"]:
        state["step"] = before
    for kind, lost in (("preempt_at", "SUSPENDED"), ("fail_at", "FAILED")):
        for at in SCENARIO[kind]:
            if state["reached"] < at <= state["step"]:
                state.update(step=at, lost=lost)
    state["reached"] = max(state["reached"], state["step"])
    state["saved"] = max(state["saved"], state["step"] // SCENARIO["save_every"] * SCENARIO["save_every"])
    end = SCENARIO["end_at"]
    status = "0" if state["step"] == SCENARIO["steps"] else end[1] if end and state["step"] >= end[0] else ""
    if state["lost"]:
        return
    left = (SCENARIO["steps"] - state["step"]) * 60.0
    tell("heartbeat", step=state["step"], steps=SCENARIO["steps"], time=0, tokens_per_s=45049.0, left_s=left)
    for number in range(SCENARIO["processes"]):
        is_that = status and (status == "0" or number == 1)
        tell_process(number, "ended" if is_that else "running", status if is_that else "")


def tell(name: str, **values) -> None:
    file = BUCKET / "mine/jobs/stage1/state" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values) + "\n")


def tell_process(number: int, what: str, status: str = "") -> None:
    values = {"state": what, "status": status, "message": "", "booted": state["booted"], "time": 0}
    tell(f"process-{number}", process=number, **values)


def ssh(arguments, where):
    check_there(where, arguments.names[0])
    if state["ssh"] < SCENARIO["ssh_fails"]:
        state["ssh"] += 1
        fail(where, "[/usr/bin/ssh] exited with return code [255] on worker 2.")
    command = (arguments.command or [""])[0]
    if "restart emollama" in command or "tpu_startup.sh" in command:
        state.update(stuck=False, step=state["saved"], installed_for=0)
    elif "stop emollama" in command:
        for number in range(SCENARIO["processes"]):
            tell_process(number, "stopped")
    elif command:
        print("".join(f"worker {i}: {command}\n" for i in range(SCENARIO["processes"])), end="")


def local(url: str) -> Path:
    return BUCKET / url.removeprefix("gs://")


def matches(url: str) -> list[Path]:
    path = local(url)
    files = path.parent.iterdir() if path.parent.is_dir() else []
    return sorted(file for file in files if file.is_file() and fnmatch.fnmatch(file.name, path.name))


def found(arguments, where) -> list[Path]:
    files = [file for url in arguments.names for file in matches(url)]
    if not files:
        fail(where, "The following URLs matched no objects or files:\n" + "\n".join(arguments.names))
    return files


def cat(arguments, where):
    for file in found(arguments, where):
        print(file.read_text(errors="replace"), end="")


def rm(arguments, where):
    for file in found(arguments, where):
        file.unlink()


def cp(arguments, where):
    *sources, target = arguments.names
    if sources == ["-"]:
        local(target).parent.mkdir(parents=True, exist_ok=True)
        local(target).write_text(sys.stdin.read())
        return
    for source in sources:
        file = local(source) if source.startswith("gs://") else Path(source)
        there = local(target) / file.name if target.endswith("/") else local(target)
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_bytes(file.read_bytes())


if __name__ == "__main__":
    sys.exit(main())

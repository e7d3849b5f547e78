"""Watches a run on Cloud TPU until it ends: creates slices again that were taken away, starts again what stands still.

The slices start, install and go on by themselves (`tpu_startup.sh`) and tell of it in the job's folder of the bucket:
`state/heartbeat.json` has the last step, `state/process-I.json` whether process I runs or how it ended.
"""

import collections
import contextlib
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from tpu_cloud import Cloud, CloudError

NEEDS_A_PERSON = {"1": "a defect", "2": "arguments, paths or data that do not fit", "4": "a loss that is not finite"}
LOST = ("FAILED", "SUSPENDED")
TRIES = 3  # of what fails at once for a passing reason, before the slices are created again
RESTART = "sudo systemctl kill --signal=KILL emollama; sudo systemctl restart emollama"
STOP = "sudo systemctl stop emollama; sudo /opt/emollama/report stopped"


class Watch:
    """One `poll` after another.

    Args:
        retries: how often in a row slices are created without a new step of the run; -1: without limit.
        stall_s: without a new step for so long, the run is started again on all machines.
        log: takes lines.
    """

    def __init__(
        self,
        cloud: Cloud,
        *,
        retries: int,
        stall_s: float,
        poll_s: float,
        log: Callable[[str], None],
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.time,
    ):
        self._cloud, self._retries, self._stall_s, self._poll_s = cloud, retries, stall_s, poll_s
        self._log, self._sleep, self._clock = log, sleep, clock
        self._line = ""
        self._created = self._failures = self._stalls = 0  # since the last new step
        self._to_create = False
        self._step: int | None = None
        self._furthest = -1
        self._moved = clock()
        self._spells = _read_spells(cloud)

    def run(self) -> int:
        """Returns the run's exit code, once it has ended."""
        try:
            while True:
                code = None
                try:
                    code = self._poll()
                except CloudError as error:  # the network here, or the cloud's: the run needs neither
                    self._say(str(error))
                if code is not None:
                    return code
                self._sleep(self._poll_s)
        finally:
            with contextlib.suppress(CloudError):
                self._cloud.write("spells.json", json.dumps(self._spells) + "\n")

    def look(self) -> None:
        """Logs how things are."""
        found = self._cloud.find()
        state = found["state"]["state"] if found else "nothing there"
        if state != "ACTIVE":
            self._say(" ".join([state, *(_reason(found) if found else [])]))
            return
        heartbeat, processes = _read_state(self._cloud)
        self._count_time(processes)
        self._say("  ".join([state, *self._describe(heartbeat, processes)]))

    @staticmethod
    def restart(cloud: Cloud) -> None:
        """Starts the run again on all machines, also where it hangs."""
        cloud.ssh_everywhere(RESTART)

    def _poll(self) -> int | None:
        if self._to_create:
            return self._recreate("NOT THERE")
        found = self._cloud.find()
        if found is None:
            self._say("GONE: someone deleted it; what it did is in the bucket")
            return 1
        state = found["state"]["state"]
        if state in LOST:
            return self._recreate(" ".join([state, *_reason(found)]))
        if state != "ACTIVE":
            self._moved = self._clock()
            self._say(state)
            return None
        return self._follow(*_read_state(self._cloud))

    def _follow(self, heartbeat: Mapping[str, Any], processes: Mapping[int, Mapping[str, Any]]) -> int | None:
        """Acts on what the machines of an active slice tell."""
        step, now = heartbeat.get("step"), self._clock()
        if step is not None and step != self._step:
            if step > self._furthest:
                self._created = self._stalls = 0
            self._step, self._furthest, self._moved = step, max(step, self._furthest), now
        if any(process["state"] == "installing" for process in processes.values()):
            self._moved = now  # which takes its time, and ends by itself
        self._count_time(processes)
        self._say("  ".join(["ACTIVE", *self._describe(heartbeat, processes)]))
        for number, process in sorted(processes.items()):
            ended = process["state"] == "ended" and process["status"] in NEEDS_A_PERSON
            if ended or process["state"] == "unfit":
                return self._give_up(number, process)
        first = processes.get(0, {})
        if first.get("state") == "ended" and first["status"] == "0":
            self._say(f"DONE  {self._spent()}")
            return 0
        if first.get("state") == "stopped":
            self._say(f"STOPPED: saved; `run` goes on  {self._spent()}")
            return 75
        if now - self._moved > self._stall_s:
            return self._unstick()
        return None

    def _describe(self, heartbeat: Mapping[str, Any], processes: Mapping[int, Mapping[str, Any]]) -> list[str]:
        parts = []
        if heartbeat:
            parts.append(f"step {heartbeat['step']:,}/{heartbeat['steps']:,}")
            if heartbeat.get("tokens_per_s"):
                parts.append(f"{heartbeat['tokens_per_s']:,.0f} tokens/s")
            if heartbeat.get("left_s") is not None:
                parts.append(f"{_duration(heartbeat['left_s'])} left")
        states = collections.Counter(f"{x['state']} {x['status']}".strip() for x in processes.values())
        running = states.pop("running", 0)
        parts += [f"{count} of {len(processes)} {state}" for state, count in sorted(states.items())]
        if not heartbeat and running == len(processes):
            parts.append(f"{running} started, no step yet" if running else "no process yet")
        return [*parts, self._spent()]

    def _give_up(self, number: int, process: Mapping[str, Any]) -> int:
        """Ends a run that a person has to mend."""
        status = process["status"]
        what = process["message"] or f"exit code {status}, {NEEDS_A_PERSON[status]}"
        name = self._cloud.launch.name
        self._say(f"process {number}: {what}; logs --name={name} --process={number} has its last words")
        with contextlib.suppress(CloudError):
            self._cloud.ssh_everywhere(STOP)
        return int(status) if status.isdecimal() else 1

    def _unstick(self) -> int | None:
        """Starts a run again that makes no step."""
        where = f"STALLED at step {self._step or 0:,}"
        if self._stalls == TRIES:
            return self._recreate(where)
        try:
            self.restart(self._cloud)
        except CloudError as error:
            self._failures += 1
            self._say(f"{where}: {error}")
            return self._recreate("out of reach") if self._failures == TRIES else None
        self._stalls, self._failures, self._moved = self._stalls + 1, 0, self._clock()
        self._say(f"{where}: started again on all machines")
        return None

    def _recreate(self, why: str) -> int | None:
        """Deletes what is there and asks for it again, later the oftener it was in vain."""
        if 0 <= self._retries <= self._created:
            self._say(f"{why}: given up after {self._created} times without a new step (--retries)")
            return 1
        wait = self._poll_s * min(2**self._created, 16) if self._created else 0.0
        self._created += 1
        count = self._created if self._retries < 0 else f"{self._created} of {self._retries}"
        self._say(f"{why}: created again ({count} without a new step)" + (f" in {wait:.0f} s" if wait else ""))
        self._sleep(wait)
        self._to_create = True  # also where one of these fails
        try:
            self._cloud.delete()
            self._cloud.forget("state/process-*")
            self._cloud.create()
        except CloudError as error:
            self._say(f"not created: {error}")
            return None
        self._to_create, self._stalls, self._failures, self._moved = False, 0, 0, self._clock()
        return None

    def _count_time(self, processes: Mapping[int, Mapping[str, Any]]) -> None:
        """Counts the time since the first machine of this spell was booted, by which spells differ."""
        if 0 in processes:
            booted = processes[0]["booted"]
            self._spells[str(booted)] = max(0.0, self._clock() - booted)

    def _spent(self) -> str:
        return f"{self._cloud.launch.chips * sum(self._spells.values()) / 3600:.1f} chip-hours"

    def _say(self, line: str) -> None:
        if line != self._line:
            self._log(line)
        self._line = line


def _read_state(cloud: Cloud) -> tuple[Mapping[str, Any], dict[int, Mapping[str, Any]]]:
    """Returns the heartbeat, empty before the first, and what each process tells of itself."""
    try:
        lines = [json.loads(line) for line in cloud.read("state/*.json").splitlines() if line]
    except CloudError as error:
        if "matched no objects" not in str(error):
            raise
        lines = []
    heartbeat = next((line for line in lines if "step" in line), {})
    return heartbeat, {line["process"]: line for line in lines if "process" in line}


def _read_spells(cloud: Cloud) -> dict[str, float]:
    """Returns the seconds of the spells before, by when their machines were booted."""
    try:
        return json.loads(cloud.read("spells.json") or "{}")
    except CloudError:
        return {}


def _reason(found: Mapping[str, Any]) -> list[str]:
    error = found["state"].get("failedData", {}).get("error", {})
    return [f"({error['message']})"] if error.get("message") else []


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"

"""A Slurm of one node in a folder: munged, slurmctld and slurmd of this machine's own, ended with the block."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
# A job that is queued again waits until the credentials of its last start have expired (default: 120 s); one that is
# made to start earlier may be refused for good.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=15
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
KillWait=30
SchedulerParameters=sched_interval=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=2000 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str:
    """Why there can be no Slurm here; "" where there can."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    if missing := [program for program in PROGRAMS if not shutil.which(program, path=path)]:
        return f"no {', '.join(missing)} here (Debian's slurm-wlm)"
    return "" if os.geteuid() == 0 else "a Slurm of one's own needs root"


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Gives the environment in which sbatch and the others find it."""
    host = socket.gethostname().partition(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    cpus = max(2, os.cpu_count() or 2)
    text = CONFIGURATION.format(folder=folder, host=host, ports=_free_ports(2), cpus=cpus)
    (folder / "slurm.conf").write_text(text)
    environment = os.environ | {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": f"{os.environ['PATH']}:/usr/sbin",
    }
    files = {"key": "munge.key", "socket": "munge.socket", "pid": "munge.pid", "log": "munge.log", "seed": "munge.seed"}
    munge = [f"--{what}{'' if what == 'socket' else '-file'}={folder / name}" for what, name in files.items()]
    commands = [["munged", "--foreground", "--force", *munge], ["slurmctld", "-D"], ["slurmd", "-D", "-N", host]]
    with contextlib.ExitStack() as stack:
        for command in commands:
            output = stack.enter_context((folder / f"{command[0]}.out").open("w"))
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
            stack.callback(_end, process)
            if command[0] == "munged":
                _wait(lambda: (folder / "munge.socket").exists())
        idle = ["sinfo", "--noheader", "--format=%T"]
        ask = lambda: subprocess.run(idle, env=environment, capture_output=True, text=True).stdout.strip()
        _wait(lambda: ask() == "idle")
        yield environment


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait(is_so, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "Slurm does not start"
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]

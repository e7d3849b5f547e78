"""Runs a command as a pod of several processes on this machine, each with its own virtual CPU devices.

    python launch/local_pod.py --processes 2 --devices 4 -- emollama train --config tiny ...

Each line of output begins with the number of its process. A signal to end goes on to all of them. The exit code is that
of the first process that failed; when one dies, the others have a minute to notice and are then ended.
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

GRACE_S = 60


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--devices", type=int, default=4, metavar="N", help="of each process (default: %(default)s)")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what each process runs")
    arguments = parser.parse_args(argv)
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command or arguments.processes < 1 or arguments.devices < 1:
        parser.error("give a command after --, and one or more processes and devices")
    return run_pod(command, arguments.processes, arguments.devices)


def run_pod(command: Sequence[str], processes: int, devices: int) -> int:
    """Starts the processes, passes signals on, and returns the exit code."""
    address = f"127.0.0.1:{_free_port()}"
    pod = [subprocess.Popen(command, **_settings(address, processes, devices, i)) for i in range(processes)]
    printers = [threading.Thread(target=_print_lines, args=(i, process)) for i, process in enumerate(pod)]
    for printer in printers:
        printer.start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: [process.send_signal(number) for process in pod])
    code, deadline = 0, None
    while None in [process.poll() for process in pod]:
        time.sleep(0.1)
        for i, process in enumerate(pod):
            if process.returncode and not code:
                code, deadline = process.returncode, time.monotonic() + GRACE_S
                print(f"local_pod: process {i} {_ending(code)}", file=sys.stderr, flush=True)
        if deadline and time.monotonic() > deadline:
            for process in pod:
                process.kill()
    for process, printer in zip(pod, printers, strict=True):
        with contextlib.suppress(ProcessLookupError):  # what it started and left behind
            os.killpg(process.pid, signal.SIGKILL)
        printer.join()
    code = code or next((process.returncode for process in pod if process.returncode), 0)
    return 128 - code if code < 0 else code


def _settings(address: str, processes: int, devices: int, index: int) -> dict:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags.strip(),
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(index),
        "PATH": f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return {"env": environment, "start_new_session": True, **pipes}


def _print_lines(index: int, process: subprocess.Popen) -> None:
    for line in process.stdout:
        print(f"[{index}] {line}", end="", flush=True)


def _ending(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())

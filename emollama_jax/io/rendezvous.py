"""Processes of one run find out over TCP whether all of them are there, before anything that cannot wait in vain.

Process 0 listens at the address of the run. Each of the others connects and sends its number; when all have come, or
the patience is at its end, process 0 answers all of them alike: with nothing, or with what is wrong.
"""

import contextlib
import os
import socket
import time
from collections.abc import Callable

RETRY_S = 0.5  # between two attempts to connect
MARGIN_S = 5.0  # for an answer to arrive


class MissingError(Exception):
    """Not all processes came, or the first one cannot be reached; the message says which."""


def meet(
    address: str, processes: int, process: int, patience_s: int | float, log: Callable[[str], None] = lambda line: None
) -> None:
    """Returns when all processes have come to `address`.

    Args:
        address: HOST:PORT of process 0. JAX_COORDINATOR_BIND_ADDRESS names another one for it to listen at.
        process: the number of this one, from 0.
        patience_s: how long the others may take.
        log: is told what is waited for.

    Raises:
        MissingError: they have not come in time, or `address` cannot be listened at.
    """
    log(f"process {process} of {processes}: waiting at most {patience_s:.0f} s for the others at {address}")
    deadline = time.monotonic() + patience_s
    if process == 0:
        _wait_for_others(os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or address, processes, deadline, patience_s)
    else:
        _report_to_first(address, process, deadline, patience_s)


def _wait_for_others(address: str, processes: int, deadline: int | float, patience_s: int | float) -> None:
    port = _split(address)[1]
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        server = socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6)
    except OSError as error:
        raise MissingError(f"cannot listen at port {port}: {error.strerror}") from error
    with server, contextlib.ExitStack() as stack:
        come: dict[int, socket.socket] = {}
        while len(come) < processes - 1 and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(OSError, ValueError):  # someone else connects, or nobody
                connection = stack.enter_context(server.accept()[0])
                connection.settimeout(1.0)
                if 0 < (number := int(connection.recv(16))) < processes:
                    come[number] = connection
        missing = [str(number) for number in range(1, processes) if number not in come]
        problem = ""
        if missing:
            problem = f"of {processes} processes {', '.join(missing)} did not come to {address} in {patience_s:.0f} s"
        for connection in come.values():
            with contextlib.suppress(OSError):
                connection.sendall(f"{problem}\n".encode())
        if problem:
            raise MissingError(problem)


def _report_to_first(address: str, process: int, deadline: int | float, patience_s: int | float) -> None:
    why = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(_split(address), timeout=left) as connection:
                connection.sendall(str(process).encode())
                connection.settimeout(left + MARGIN_S)
                answer = connection.makefile(encoding="utf-8", errors="replace").readline()
            if answer:
                if problem := answer.strip():
                    raise MissingError(problem)
                return
        except OSError as error:
            why = error.strerror or str(error)
        time.sleep(min(RETRY_S, max(0.0, deadline - time.monotonic())))
    raise MissingError(f"process 0 was not reached at {address} in {patience_s:.0f} s: {why}")


def _split(address: str) -> tuple[str, int]:
    """Splits HOST:PORT. Raises MissingError where it is none."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) >= 1 << 16:
        raise MissingError(f"no address HOST:PORT: {address}")
    return host.strip("[]"), int(port)

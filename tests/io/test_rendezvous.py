"""Processes that meet before JAX starts: all, or none and told why."""

import socket
import threading
import time

import pytest

from emollama_jax.io.rendezvous import MissingError, meet


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def outcomes(address: str, processes: int, started: dict[int, float], patience_s: float) -> dict[int, str]:
    """What becomes of the processes that are `started`, each after so many seconds."""
    found = {}

    def one(process: int, delay_s: float) -> None:
        time.sleep(delay_s)
        try:
            meet(address, processes, process, patience_s)
            found[process] = "met"
        except MissingError as error:
            found[process] = str(error)

    threads = [threading.Thread(target=one, args=item) for item in started.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return found


@pytest.mark.smoke
@pytest.mark.parametrize("first_s", [0.0, 0.1])
def test_all_meet_whoever_is_first(first_s):
    address = f"127.0.0.1:{free_port()}"
    assert outcomes(address, 3, {0: first_s, 1: 0.0, 2: 0.05}, 20) == dict.fromkeys(range(3), "met")
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))):
        pass  # JAX listens there next


def test_all_are_told_who_is_missing():
    address = f"127.0.0.1:{free_port()}"
    missing = f"of 4 processes 1, 3 did not come to {address} in 1 s"
    assert outcomes(address, 4, {0: 0.0, 2: 0.0}, 0.6) == {0: missing, 2: missing}


def test_the_first_one_is_missing():
    address = f"127.0.0.1:{free_port()}"
    assert outcomes(address, 2, {1: 0.0}, 0.2)[1].startswith(f"process 0 was not reached at {address} in 0 s: ")


def test_strangers_are_passed_over():
    address = ("127.0.0.1", free_port())

    def call() -> None:
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"7", b"0", b""):
            with socket.create_connection(address) as connection:
                connection.sendall(words)

    stranger = threading.Timer(0.1, call)
    stranger.start()
    found = outcomes(f"{address[0]}:{address[1]}", 2, {0: 0.0, 1: 0.6}, 20)
    stranger.join()
    assert found == {0: "met", 1: "met"}


def test_what_cannot_be_listened_at_is_told():
    with socket.create_server(("", 0)) as taken, pytest.raises(MissingError, match="cannot listen at port"):
        meet(f"127.0.0.1:{taken.getsockname()[1]}", 2, 0, 1)
    for address in ("host", "host:port", "host:99999", ":1"):
        with pytest.raises(MissingError, match="no address HOST:PORT"):
            meet(address, 2, 0, 1)

import os
import signal

import jax
import pytest

from emollama_jax import cli, distributed
from emollama_jax.distributed import ENVIRONMENT, Group, PreemptionGuard, find_group, process_group
from emollama_jax.errors import UserError
from tests.io.test_rendezvous import free_port

OURS = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


@pytest.mark.parametrize(
    "flags, environment, expected",
    [
        ((None, None, None), {}, None),
        (("host:1234", "4", "3"), {}, Group("host:1234", 4, 3)),
        (("host:1234", "1", "0"), {}, None),
        ((None, None, None), OURS, Group("a:1", 2, 1)),
        (("host:1234", "4", "3"), OURS, Group("host:1234", 4, 3)),
        ((None, None, None), {"SLURM_STEP_NUM_TASKS": "8"}, Group()),
        ((None, None, None), {"SLURM_STEP_NUM_TASKS": "1"}, None),
        ((None, None, None), {"TPU_WORKER_HOSTNAMES": "t-0,t-1"}, Group()),
        ((None, None, None), {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ],
)
def test_the_group_is_found_by_flags_then_environment(flags, environment, expected):
    assert find_group(*flags, environment=environment) == expected


@pytest.mark.smoke
def test_a_pod_is_what_jax_finds():
    assert find_group(pod=True, environment={}) == Group()


@pytest.mark.parametrize(
    "flags, environment, message",
    [
        (("host:1", "2", None), {}, "--coordinator, --processes and --process: give all three"),
        (("host:1", "2", "2"), {}, "process 2 of 2; count them from 0"),
        (("host:1", "two", "0"), {}, "process 0 of two"),
        ((None, None, None), {"JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS, .*: give all three"),
    ],
)
def test_half_a_group_is_refused(flags, environment, message):
    with pytest.raises(UserError, match=message):
        find_group(*flags, environment=environment)


@pytest.mark.parametrize(
    "name, flags, message",
    [
        (
            "jax.distributed.initialize",
            ["--coordinator=a:1", "--processes=2", "--process=1"],
            "did not meet (DEADLINE)",
        ),
        ("jax.devices", [], "no devices (DEADLINE); JAX_PLATFORMS=cpu runs on the processor"),
    ],
)
def test_what_cannot_start_is_exit_code_3(monkeypatch, capsys, name, flags, message):
    def fails(*args, **kwargs):
        raise RuntimeError("DEADLINE\nand much more")

    for variable in ENVIRONMENT:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(distributed, "meet", lambda *arguments: None)
    monkeypatch.setattr(name, fails)
    assert cli.main(["train", "--config=tiny", *flags]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("emollama train: error: ") and message in line


def test_a_process_that_stays_alone_is_exit_code_3(monkeypatch, capsys):
    """JAX itself would end it by a signal, after minutes."""
    monkeypatch.setattr(distributed, "PATIENCE_S", 0.2)
    monkeypatch.setattr("jax.distributed.initialize", lambda **kwargs: pytest.fail("JAX waits"))
    for process, said in ((0, "of 2 processes 1 did not come to"), (1, "process 0 was not reached at")):
        flags = [f"--coordinator=127.0.0.1:{free_port()}", "--processes=2", f"--process={process}"]
        assert cli.main(["train", "--config=tiny", *flags]) == 3
        told, error = capsys.readouterr().err.splitlines()
        assert f"process {process} of 2: waiting at most 0 s" in told
        assert "the processes of the run did not meet" in error and said in error and "--wait" in error


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_of_a_slurm_job_that_stays_alone_is_exit_code_3(monkeypatch, capsys, process):
    """Its address is what JAX makes of Slurm's environment."""
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    port = free_port()
    job = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost,node[02-03]", "SLURM_NTASKS": "2"}
    job |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(process), "SLURM_LOCALID": "0"}
    for name, value in (job | {"JAX_COORDINATOR_PORT": str(port)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "PATIENCE_S", 0.2)
    monkeypatch.setattr("jax.distributed.initialize", lambda **kwargs: pytest.fail("JAX waits"))
    said = ("of 2 processes 1 did not come to", "process 0 was not reached at")[process]
    assert cli.main(["train", "--config=tiny"]) == 3
    told, error = capsys.readouterr().err.splitlines()
    assert f"process {process} of 2: waiting at most 0 s for the others at localhost:{port}" in told
    assert f"{said} localhost:{port}" in error and "--wait" in error


def test_what_jax_finds_it_gets_itself(monkeypatch):
    """When all have come, and within a time that agrees with ours; one process alone waits for nobody."""
    seen, met = [], []
    monkeypatch.setattr("jax.distributed.initialize", lambda **kwargs: seen.append(kwargs))
    monkeypatch.setattr("jax.distributed.shutdown", lambda: None)
    monkeypatch.setattr(distributed, "meet", lambda *arguments: met.append(arguments[:4]))
    job = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[02-03]", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
    for name, value in (job | {"JAX_COORDINATOR_PORT": "99"}).items():
        monkeypatch.setenv(name, value)
    for processes in ("1", "2"):
        monkeypatch.setenv("SLURM_NTASKS", processes)
        with process_group(Group(), patience_s=7):
            pass
    assert met == [("node02:99", 2, 1, 7)]
    assert [kwargs["initialization_timeout"] for kwargs in seen] == [60, 60]
    assert not any("coordinator_address" in kwargs for kwargs in seen)


def test_jax_waits_where_it_does_not_say_what_it_finds(monkeypatch):
    """Its detection is private to it."""
    seen = []
    monkeypatch.setattr("jax.distributed.initialize", lambda **kwargs: seen.append(kwargs["initialization_timeout"]))
    monkeypatch.setattr("jax.distributed.shutdown", lambda: None)
    monkeypatch.setattr("jax._src.clusters.ClusterEnv", object)
    with process_group(Group(), patience_s=6.5):
        pass
    assert seen == [7]


def test_processes_are_not_looked_for_behind_a_proxy(monkeypatch):
    proxies = {"http_proxy": "http://10.255.255.1:3128", "https_proxy": "http://10.255.255.1:3128"}
    seen = {}
    for name, value in proxies.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("jax.distributed.initialize", lambda **kwargs: seen.update(os.environ))
    monkeypatch.setattr("jax.distributed.shutdown", lambda: None)
    with process_group(Group()):
        assert "PATH" in seen and not proxies.keys() & seen.keys()
        assert proxies.items() <= os.environ.items()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_notice_and_ctrl_c_again_interrupts(number):
    assert jax.process_count() == 1
    said, before = [], [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    with PreemptionGuard(said.append) as guard:
        assert not guard.should_stop(1)
        signal.raise_signal(number)
        assert guard.should_stop(2)
        signal.raise_signal(signal.SIGTERM)
        if number == signal.SIGINT:
            assert ["saves after this step" in line for line in said] == [True]
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == before

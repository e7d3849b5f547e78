import pytest

from emollama_jax import cli
from emollama_jax.distributed import ENVIRONMENT, Group, find_group
from emollama_jax.errors import UserError

pytestmark = pytest.mark.smoke
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
    monkeypatch.setattr(name, fails)
    assert cli.main(["train", "--config=tiny", *flags]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("emollama train: error: ") and message in line

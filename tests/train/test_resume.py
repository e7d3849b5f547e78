"""Runs that are killed anywhere and started again, beside one that was not: the same to the last bit."""

import pytest

from tests.train.runs import assert_same_run, final_state, finish, lines, make_inputs, start, trace

KILLED, PREEMPTED = -9, 75


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.slow
def test_killed_in_a_step_and_in_a_save_and_asked_to_end(inputs, tmp_path):
    """With a checkpoint every second step."""
    fields = {"train__checkpoint_interval": 2, "train__steps": 6}
    fields |= {"train__validation": f"{inputs}/clips:held", "train__validation_interval": 3}
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    beside = start(inputs, unbroken, **fields)
    finish(start(inputs, broken, "step", 3, **fields), KILLED)
    assert [step for step, *_ in trace(broken)] == [1, 2]
    finish(start(inputs, broken, "saving", 4, **fields), KILLED)  # from step 2, unless its save had not ended either
    output = finish(start(inputs, broken, "term", 5, **fields), PREEMPTED)
    assert "step 5: asked to end" in output
    output = finish(start(inputs, broken, **fields), 0)
    assert "resumed from step 5" in output and "step 6: all steps are done" in output
    finish(beside, 0)
    assert [line["step"] for line in lines(broken)] == [1, 2, 3, 3, 4, 5, 6, 6]  # validations after 3 and 6
    assert len({line["batch"] for line in lines(broken) if "batch" in line}) == 6
    assert_same_run(broken, unbroken)


@pytest.mark.slow
def test_killed_at_every_step(inputs, tmp_path):
    """In its save, just after it, and in the step itself; two processes of four devices each, whose workers read."""
    from tests.train.pod import finish_pod, start_pod

    fields = {"data__workers": 2, "train__steps": 4, "mesh__fsdp": -1, "train__keep": 3}

    def attempt(workdir, how, step, expected):
        return finish_pod(start_pod(inputs, workdir, how, step, **fields), expected)

    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    attempt(unbroken, "never", 0, 0)
    for step in range(1, 4):
        attempt(broken, ("step", "saving", "unsealed")[step % 3], step, KILLED)
    attempt(broken, "never", 0, 0)
    assert_same_run(broken, unbroken)
    assert [step for step, *_ in trace(broken)] == [1, 2, 3, 4]
    assert final_state(broken)["step"] == 4

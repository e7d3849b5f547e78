import json

import pytest
from etils import epath

from emollama_jax.train import heartbeat as module
from emollama_jax.train.heartbeat import Heartbeat

pytestmark = pytest.mark.smoke


def test_the_last_step_is_there_when_a_run_ends(tmp_path):
    file = epath.Path(tmp_path) / "state/heartbeat.json"
    beat = Heartbeat(file, 100, after=4, every_s=60)
    for step, scalars in (
        (5, {"loss": 1.0, "tokens_per_s": 7.0}),
        (6, {"loss": 1.0, "tokens_per_s": 9.0}),
        (6, {"validation_loss": 2.0}),
    ):
        beat.write_scalars(step, scalars)
    beat.close()
    found = json.loads(file.read_text())
    assert (found["step"], found["steps"], found["tokens_per_s"]) == (6, 100, 9.0)
    assert found["left_s"] > 0 and found["time"] > 1.7e9
    assert file.read_text().count("\n") == 1


def test_a_run_tells_that_it_is_there_before_its_first_step(tmp_path):
    Heartbeat(epath.Path(tmp_path) / "beat", 100, after=4).close()
    found = json.loads((tmp_path / "beat").read_text())
    assert (found["step"], found["tokens_per_s"], found["left_s"]) == (4, None, None)


def test_a_place_that_cannot_be_written_does_not_end_the_run(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(module, "_log", said.append)
    (tmp_path / "file").write_text("")
    beat = Heartbeat(epath.Path(tmp_path) / "file/beat", 100, after=0)
    beat.write_scalars(1, {"loss": 1.0})
    beat.close()
    assert said and "the heartbeat was not written" in said[0]

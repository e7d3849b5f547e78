import dataclasses
from pathlib import Path

import pytest

from emollama_jax.config import load_config
from emollama_jax.errors import UserError
from emollama_jax.plan.overlay import overlay
from emollama_jax.plan.search import with_rows
from emollama_jax.plan.topology import parse_topology
from tests.plan.figures import experiment, figures, planned, too_big

V5E = parse_topology("v5e-16")


@pytest.mark.smoke
def test_the_best_is_written_as_an_experiment(tmp_path):
    changes = {"mesh": {"data": 2, "fsdp": 8}, "llama": {"kernel_dtype": "int8", "remat": "dots"}}
    base = experiment()
    config = with_rows(experiment(**changes, data={"train": ("data/mine:train",)}), 4, base, V5E)
    one = planned(dataclasses.replace(config, seed=7), figures())
    text = overlay(tmp_path / "best.py", "stage1_merr", one)
    (tmp_path / "best.py").write_text(text)
    assert load_config(str(tmp_path / "best.py")) == one.config
    assert f"    emollama train --config {tmp_path / 'best.py'}\n" in text
    assert "    emollama train --config best\n" in overlay(Path("configs/best.py"), "stage1_merr", one)
    assert "4.00 of 15.75 GiB a chip" in text and "nothing has been measured" in text
    assert "lora" not in text
    assert all(len(line) <= 120 for line in text.splitlines() if "emollama plan" not in line)


def test_nothing_is_written_where_nothing_fits(tmp_path):
    with pytest.raises(UserError, match="no candidate fits v5e-16; the one that lacks least needs 20.00 GiB"):
        overlay(tmp_path / "best.py", "stage1_merr", planned(experiment(), too_big(20)))


def test_of_gpus_the_speed_is_called_a_ceiling(tmp_path):
    text = lambda topology: overlay(tmp_path / "best.py", "stage1_merr", planned(experiment(), figures(), topology))
    assert "MFU, were all its arithmetic at the peak: a ceiling.\n" in text("h100-8")
    assert "ceiling" not in text("v5e-16")

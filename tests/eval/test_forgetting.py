"""What each stage keeps: stages are found by the weights they began with, and measured on the same clips."""

import json

import numpy as np
import pytest

from emollama_jax import cli
from emollama_jax.errors import UserError
from emollama_jax.eval.forgetting import find_stages, find_validation_splits
from emollama_jax.runs.run import Run
from tests.train.runs import arguments, make_inputs


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Two runs of one step, the second from the first's weights; the first was validated."""
    inputs = make_inputs(tmp_path_factory.mktemp("inputs"))
    first, second = inputs / "stage1", inputs / "stage2"
    few = {"train__steps": 1, "train__warmup_steps": 0, "mesh__data": -1}
    held = {"train__validation": f"{inputs}/clips:held"}
    assert cli.main(["train", *arguments(inputs, first, prompt__tasks="emotion", **few, **held)]) == 0
    assert cli.main(["train", *arguments(inputs, second, weights__trained=first, prompt__tasks="reason", **few)]) == 0
    return inputs, first, second


@pytest.mark.slow
def test_each_checkpoint_on_each_split(stages, tmp_path, capsys):
    inputs, first, second = stages
    found = find_stages(Run.open(second))
    assert [str(run.path) for run in found] == [str(first), str(second)]
    assert find_validation_splits(found) == [f"{inputs}/clips:held"]
    assert cli.main(["evaluate", "forgetting", str(second), "--out", str(tmp_path / "out")]) == 0
    rows = json.loads((tmp_path / "out/forgetting.json").read_text())
    assert [row["stage"] for row in rows] == [str(first), str(second)]
    assert all(np.isfinite(row["caption_loss"]) and 0 <= row["scores"]["weighted_f1"] <= 1 for row in rows)
    assert rows[0]["caption_loss"] > rows[1]["caption_loss"]  # the second learnt captions
    assert (tmp_path / "out/forgetting.png").read_bytes()[:4] == b"\x89PNG"
    page = (tmp_path / "out/forgetting.md").read_text()
    assert f"| {first}, step 1 | {inputs}/clips:held | 6 | " in page and page in capsys.readouterr().out


@pytest.mark.slow
def test_several_runs_against_another_over_all_views(stages, tmp_path, capsys):
    inputs, first, second = map(str, stages)
    argv = ["evaluate", "labels", "--runs", first, second, "--against", second, "--modalities", "all"]
    argv += ["--out", str(tmp_path / "out"), "--data"]
    assert cli.main([*argv, f"{inputs}/clips:held"]) == 0
    found = json.loads((tmp_path / "out/runs.json").read_text())
    assert [cell["modalities"] for cell in found["cells"]] == ["A", "V", "T", "AV", "AT", "VT", "AVT"]
    assert all(len(cell["runs"]["accuracy"]["values"]) == 2 and len(cell["mcnemar"]) == 1 for cell in found["cells"])
    assert found["checkpoints"][first].endswith(f"validated on {inputs}/clips:held")
    rows = json.loads((tmp_path / "out/2-stage2/sweep.json").read_text())
    assert [row["scores"]["accuracy"] for row in rows] == [c["runs"]["accuracy"]["values"][1] for c in found["cells"]]
    assert "Checkpoint: step 1" in (tmp_path / "out/1-stage1/sweep.md").read_text()
    assert (tmp_path / "out/runs.md").read_text() in capsys.readouterr().out

    alone = ["evaluate", "labels", "--trained", second, "--modalities", "all", "--out", str(tmp_path / "one")]
    assert cli.main([*alone, "--data", f"{inputs}/clips:held", "--conflicts"]) == 0
    assert [p.name for p in sorted((tmp_path / "one").glob("conflicts-*.json"))] == ["conflicts-first.json"]
    assert cli.main([*alone, "--data", f"{inputs}/clips:train"]) == 2
    assert "was trained on" in capsys.readouterr().err


def test_no_split_to_measure_on_is_one_line(tmp_path, capsys):
    from tests.train.runs import write_meta

    write_meta(tmp_path / "run/checkpoints/1")
    with pytest.raises(UserError, match="no stage was validated"):
        find_validation_splits(find_stages(Run.open(tmp_path / "run")))
    assert cli.main(["evaluate", "forgetting", "--out", str(tmp_path / "out")]) == 2
    assert "give the last stage's run" in capsys.readouterr().err
    assert cli.main(["evaluate", "dfew", "stray", "--data", "x:test", "--config=tiny", "--out", str(tmp_path)]) == 2
    assert "stray: goes with forgetting" in capsys.readouterr().err

"""Two processes extract one data set: each reads and encodes its share, and both find it whole."""

import sys

import numpy as np
import pytest

from emollama_jax.data.parts import CLIPS_PER_PART
from emollama_jax.data.records import Records
from emollama_jax.synthetic.dataset import make_dataset
from tests.train.runs import environment, finish, spawn

pytest.importorskip("av")


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path):
    made = make_dataset(tmp_path / "clips", clips={"train": CLIPS_PER_PART + 2}, workers=1)
    small = {"mae.image_size": 16, "videomae.image_size": 16, "projectors.feature_size": 32, "clip.max_faces": 2}
    extract = ["-m", "emollama_jax", "extract", "--config=tiny", *(f"--config.{k}={v}" for k, v in small.items())]
    extract += ["clips", f"--videos={made.root}/video", "--random-encoders", "--workers=1"]
    pod = [sys.executable, "launch/local_pod.py", "--processes=2", "--devices=1", "--"]
    both = spawn([*pod, sys.executable, *extract, f"--out={tmp_path}/both"], environment())
    alone = spawn([sys.executable, *extract, f"--out={tmp_path}/alone"], environment())
    output = finish(both, 0)
    finish(alone, 0)
    assert output.count("wrote ") == 1
    found = [Records(tmp_path / folder / "clips/frame/1.0.0", "clips") for folder in ("both", "alone")]
    assert [len(records) for records in found] == [CLIPS_PER_PART + 2] * 2
    for i in range(len(found[0])):
        one, other = (records[i] for records in found)
        assert one["name"] == other["name"]
        np.testing.assert_allclose(one["features"], other["features"], atol=1e-5)

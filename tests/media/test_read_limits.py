"""What reading a stranger's clip may take is bounded, before anything is decoded."""

import numpy as np
import pytest

from emollama_jax.errors import UserError
from emollama_jax.io.worker_pool import run_apart
from emollama_jax.media.read_limits import ReadLimits, check_pictures, memory_limited
from tests.media.hostile import pictures, write

pytest.importorskip("av")


def allocate(mib: int) -> int:
    with memory_limited(ReadLimits(memory_mib=512)):
        return np.ones(mib << 20, np.uint8).nbytes


def test_a_child_gets_no_more_memory_than_that():
    assert run_apart(allocate, 16) == 16 << 20
    with pytest.raises(MemoryError):
        run_apart(allocate, 1024)
    assert run_apart(np.ones, 100 << 20).nbytes == 800 << 20  # the limit is gone


def test_pictures_are_counted_by_their_packets(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", pictures(50))
    check_pictures(path, ReadLimits(), 2.0)
    monkeypatch.setattr("emollama_jax.media.container.decode", lambda *args, **kwargs: pytest.fail("decoded"))
    with pytest.raises(UserError, match="50 pictures of 64 x 48, over 1e.05 pixels in all; make it smaller or shorter"):
        check_pictures(path, ReadLimits(pixels=1e5), 2.0)
    with pytest.raises(UserError, match="2 s, more than 1 s; cut it into clips"):
        check_pictures(path, ReadLimits(), 1.0)

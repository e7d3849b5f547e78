import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emollama_jax.config import load_config
from emollama_jax.data.batch import Batch
from emollama_jax.io import stopwatch
from emollama_jax.io.stopwatch import Stopwatch
from emollama_jax.sharding import make_mesh
from emollama_jax.train.optimizer import learning_rate
from emollama_jax.train.report import NonFiniteError, NonFinitePolicy, Report, StepReport, make_describe
from emollama_jax.train.speed import Cost, Peak

B, T, K = 8, 6, 2


def batch() -> Batch:
    rng = np.random.default_rng(0)
    segment_ids = np.ones((B, T), np.int32)
    segment_ids[1, 4:] = 0
    clip = np.arange(B * K, dtype=np.int32).reshape(B, K)
    clip[3, 1] = -1
    tokens = rng.integers(0, 99, (B, T)).astype(np.int32)
    return Batch(
        tokens=tokens,
        soft_index=np.full_like(tokens, -1),
        segment_ids=segment_ids,
        positions=np.zeros_like(tokens),
        loss_weights=np.ones((B, T), np.float32),
        clip=clip,
        clip_mask=clip >= 0,
    )


def described(batch: Batch, devices: int = 8) -> dict[str, np.ndarray]:
    mesh = make_mesh({"data": devices, "fsdp": 1, "tensor": 1}, jax.devices()[:devices])
    return jax.device_get(make_describe(mesh)(jax.tree.map(jnp.asarray, batch)))


@pytest.mark.smoke
def test_a_batch_is_counted_and_hashed():
    found = described(batch())
    assert (found["tokens"], found["clips"]) == (B * T - 2, B * K - 1)
    np.testing.assert_array_equal(found["clip"], batch().clip)
    assert found["batch"] == described(batch(), devices=1)["batch"]
    other_token, other_clip, other_order = batch(), batch(), batch()
    other_token.tokens[5, 5] += 1
    other_clip.clip[2, 0] += 100
    other_order = jax.tree.map(lambda x: x[::-1], other_order)
    hashes = {int(described(one)["batch"]) for one in (batch(), other_token, other_clip, other_order)}
    assert len(hashes) == 4


class Kept:
    """A writer that keeps what it is given."""

    def __init__(self):
        self.lines: list[tuple[int, dict]] = []

    def write_scalars(self, step, scalars):
        self.lines.append((step, scalars))

    def flush(self): ...

    def close(self): ...


def test_rates_and_utilisation_are_of_the_time_spent_training(monkeypatch):
    """Two steps in 4 s, of which 1 s was waiting for data, after a start of 10 s; a line for both."""
    now = [0.0]
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("emollama_jax.train.report.device_peak_flops", lambda kind: Peak(flops=1000.0, bytes_per_s=1.0))
    watch, kept, cost = Stopwatch(), Kept(), Cost(frozen=100, adapters=10, attention=6)
    with watch("start"):
        now[0] += 10
    config, mesh = load_config("tiny"), make_mesh({"data": 8, "fsdp": 1, "tensor": 1})
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, log_interval=2))
    report = Report(config, mesh, kept, watch, [], cost)
    values = {"loss": 2.5, "grad_norm": 0.5, "targets": 12, **described(batch())}
    values = jax.tree.map(jnp.asarray, values)
    for step in (1, 2):
        with watch("data"):
            now[0] += 0.5
        now[0] += 1.5
        done = report.add(step, values)
        assert done == (StepReport(1, is_finite=True) if step == 2 else None)
        assert kept.lines == []  # the last step is still with the devices
    assert report.flush() == StepReport(2, is_finite=True)
    assert report.flush() is None
    ((step, line),) = kept.lines
    tokens_per_s = 2 * (B * T - 2) / 4
    assert step == 2
    assert (line["targets_per_s"], line["clips_per_s"]) == (2 * 12 / 4, 2 * (B * K - 1) / 4)
    assert line["fill"] == (B * T - 2) / (config.data.batch_rows * config.data.sequence_length)
    assert line["learning_rate"] == float(learning_rate(config.train, 1))
    assert line["data_wait"] == pytest.approx(1 / 4)
    assert line["goodput"] == pytest.approx(3 / 14)
    peak = 1000 * jax.device_count()
    assert line["mfu_4n"] == pytest.approx(4 * 110 * tokens_per_s / peak)
    length = (B * T - 2) / (B * K - 1)  # of a clip's sequence
    assert line["mfu"] == pytest.approx((4 * 100 + 6 * 10 + 6 * length) * tokens_per_s / peak)


def test_steps_that_are_not_finite_end_the_run_or_ten_in_a_row_do():
    good, bad = StepReport(1, is_finite=True), StepReport(7, is_finite=False, clips=("a", "b"))
    with pytest.raises(NonFiniteError, match="step 7: the loss or its gradient is not finite; clips .*: a, b"):
        NonFinitePolicy(skip=False, log=print).check(bad)
    said = []
    policy = NonFinitePolicy(skip=True, log=said.append)
    for report in [*[bad] * 9, None, good, *[bad] * 9]:
        policy.check(report)
    assert len(said) == 18 and said[0].endswith("clips of the batch: a, b; skipped")
    with pytest.raises(NonFiniteError):
        policy.check(bad)

"""Training on several devices and processes."""

import os
import signal
import time

import grain
import jax
import numpy as np
import pytest
from etils import epath
from flax import nnx

from emollama_jax.config import load_config
from emollama_jax.data.batch import Batch
from emollama_jax.models.emotion_llama import EmotionLlama
from emollama_jax.runs.checkpoints import Checkpoints, named_arrays
from emollama_jax.sharding import init_sharded, make_mesh, use_mesh
from emollama_jax.train.optimizer import make_optimizer
from emollama_jax.train.setup import placed_state
from emollama_jax.train.step import make_step, multimodal_loss
from tests.train.pod import children, finish_pod, start_pod
from tests.train.runs import finish, lines, make_inputs, trace

CONFIG = load_config("tiny")
B, T, K, S = 8, 48, 1, 8  # 4 image tokens of 16 patches, and NUM_FEATURE_TOKENS


def make_model() -> EmotionLlama:
    parts = (CONFIG.llama, CONFIG.lora, CONFIG.projectors, CONFIG.eva_vit)
    return EmotionLlama.init(*parts, with_encoder=False, rngs=nnx.Rngs(0))


def batch() -> Batch:
    rng, columns = np.random.default_rng(0), np.arange(T, dtype=np.int32)
    row = lambda value: np.broadcast_to(value, (B, T)).copy()
    return Batch(
        tokens=rng.integers(0, CONFIG.llama.vocab_size, (B, T)).astype(np.int32),
        soft_index=row(np.where(columns < S, columns, -1).astype(np.int32)),
        segment_ids=row(np.int32(1)),
        positions=row(columns),
        loss_weights=row(((columns >= S) & (columns < T - 1)).astype(np.float32)),
        image_tokens=rng.normal(size=(B, K, 17, 48)).astype(np.float16),
        features=rng.normal(size=(B, K, 3, 1024)).astype(np.float32),
        clip_mask=np.ones((B, K), bool),
    )


def steps_on(sizes: tuple[int, int, int], folder, *, steps: int, restored: bool):
    """(arrays on the host, the losses of so many steps, whether all lie on all the devices) on a mesh of these sizes.
    Saved after the last, or begun with what was saved and given before the first."""
    optimizer, iterator = make_optimizer(CONFIG.train), iter(grain.MapDataset.range(9).to_iter_dataset())
    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)), jax.devices()[: np.prod(sizes)])
    on_host = lambda state: {name: np.array(value) for name, value in named_arrays(state).items()}
    with use_mesh(mesh, CONFIG.sharding), Checkpoints(epath.Path(folder), keep=2) as checkpoints:
        model = init_sharded(make_model, mesh, CONFIG.sharding)
        graphdef, frozen, state = placed_state(model, optimizer, CONFIG, mesh)
        if restored:
            state = checkpoints.restore(2, state, iterator)
            arrays = on_host(state)
        everywhere = all(len(x.sharding.device_set) == np.prod(sizes) for x in named_arrays(state).values())
        step, losses = make_step(graphdef, optimizer, multimodal_loss), []
        for _ in range(steps):
            state, metrics = step(state, frozen, batch(), jax.random.key(0))
            losses.append(float(metrics["loss"]))
        if not restored:
            checkpoints.save(2, state, iterator, {})
            arrays = on_host(state)
    return arrays, losses, everywhere


@pytest.mark.slow
def test_a_checkpoint_is_the_same_on_any_number_of_devices(tmp_path):
    """Two steps on eight devices; then its arrays to the bit, and the next step's loss, on 1, 2, 4 and 8."""
    saved, before, everywhere = steps_on((2, 2, 2), tmp_path, steps=2, restored=False)
    assert everywhere and len(set(before)) == 2
    losses = []
    for sizes in ((1, 1, 1), (2, 1, 1), (1, 2, 2), (1, 8, 1)):
        found, loss, everywhere = steps_on(sizes, tmp_path, steps=1, restored=True)
        assert everywhere and found.keys() == saved.keys()
        for name, value in found.items():
            assert value.tobytes() == saved[name].tobytes(), (sizes, name)
        losses += loss
    assert losses[0] not in before
    np.testing.assert_allclose(losses[1:], losses[0], rtol=2e-6)


@pytest.mark.slow
def test_one_of_two_processes_is_killed_and_both_resume(tmp_path):
    inputs = make_inputs(tmp_path)
    fields = {"mesh__data": 2, "mesh__fsdp": 2, "train__steps": 40, "train__checkpoint_interval": 2}
    pod = start_pod(inputs, tmp_path / "run", devices=2, **fields)
    while not (tmp_path / "run/checkpoints/2/files.json").exists():
        assert pod.poll() is None
        time.sleep(0.05)
    _, second = children(pod)
    os.kill(second, signal.SIGKILL)
    killed = time.monotonic()
    output = finish(pod, 128 + 9)
    assert time.monotonic() - killed < 60
    assert "process 1 was ended by SIGKILL" in output
    assert "unhealthy" in output and "[0] 1\n" in output  # JAX in the other one, of its task
    before = trace(tmp_path / "run")
    fields["train__steps"] = last = before[-1][0] + 2
    pod = start_pod(inputs, tmp_path / "run", devices=2, **fields)
    output = finish_pod(pod, 0)
    assert "resumed from step" in output and f"step {last}: all steps are done" in output
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, last + 1))

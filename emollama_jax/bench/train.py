"""Training: how many clips a second the whole step takes in, from packed batches to new adapters and projectors.

Ours is the step of `emollama train` on batches of its own pipeline. The peer works as the original does: the same
clips, each in a row of its own, padded to the longest of the batch. Both begin with the same weights, and a
measurement whose first steps differ is an error.

Neither runs the encoder of the frame, which would take most of the time and says nothing of training: the clips have
image tokens, as data prepared with `--image image_tokens` has. These and the features are random numbers; what is said
and described is that of synthetic clips, so that the lengths vary as they do. Texts are cut into pieces of four letters
(see `predict.py`).

Axes: B rows, T positions, K clips a row.
"""

import contextlib
import dataclasses
import itertools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from emollama_jax.bench.peer import PEER, kernel_note, obstacle
from emollama_jax.bench.predict import Pieces
from emollama_jax.bench.report import (
    OURS,
    Figures,
    Measure,
    Report,
    Result,
    add_speed,
    alternate,
    check_one_device,
    peak_memory,
)
from emollama_jax.bench.train_peer import TorchTraining, one_clip_a_row
from emollama_jax.config import Config, to_dict
from emollama_jax.data.annotations import Annotations, Clip
from emollama_jax.data.batch import Batch, soft_tokens_per_clip
from emollama_jax.data.parts import ClipFeatures, make_record, write_part
from emollama_jax.data.pipeline import train_dataset
from emollama_jax.data.prepare import prepare
from emollama_jax.data.recipe import Recipe
from emollama_jax.errors import UserError
from emollama_jax.models.emotion_llama import EmotionLlama
from emollama_jax.sharding import init_sharded
from emollama_jax.synthetic.dataset import clip_spec, describe
from emollama_jax.train.optimizer import make_optimizer
from emollama_jax.train.setup import placed_state
from emollama_jax.train.speed import cost_of
from emollama_jax.train.step import make_step, multimodal_loss
from emollama_jax.weights.engine import first_device

COLUMNS = {"clips_per_s": "clips/s", "targets_per_s": "targets/s", "fill_percent": "fill %", "ms_per_step": "ms/step"}
# How far the first steps of both may be apart in float32: in the loss, and in the norm of the gradient relative to it.
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-3, 1e-4
ROUGH_TOLERANCE = 5e-2  # of both in half precision, and of the norm with dropout, which the two do not draw alike


class Step(NamedTuple):
    """What a step found."""

    loss: float
    grad_norm: float


class Amount(NamedTuple):
    """What the batches hold, all together."""

    steps: int
    clips: int
    tokens: int
    targets: int

    def figures(self, positions: int, seconds: float) -> Figures:
        """Of one pass through them that took so long, in rows of so many positions, padding included."""
        return {
            **self._asdict(),
            "seconds": seconds,
            "clips_per_s": self.clips / seconds,
            "targets_per_s": self.targets / seconds,
            "fill_percent": 100 * self.tokens / positions,
            "ms_per_step": 1e3 * seconds / self.steps,
        }


def bench_train(
    config: Config,
    *,
    steps: int = 1,
    clips: int = 64,
    tasks: Sequence[str] = ("emotion", "reason"),
    repeats: int = 3,
    with_peer: bool = True,
) -> Report:
    """Steps on batches of `config.data.batch_rows` rows; a repeat is `steps` of them, on as many batches.

    Args:
        clips: synthetic clips that the batches are drawn from; when all were drawn, they are drawn again.
        tasks: what is asked about them, in place of `config.prompt.tasks`.

    Raises:
        RuntimeError: the first steps of both differ.
    """
    _check(config)
    config = dataclasses.replace(config, prompt=dataclasses.replace(config.prompt, tasks=tuple(tasks), task_weights=()))
    why_no_peer = obstacle("torch", "transformers", "peft", wanted=with_peer)
    batches = make_batches(config, clips, steps)
    amount = amount_of(batches)
    mesh = first_device()
    parts = (config.llama.for_devices(mesh.devices.flat), config.lora, config.projectors, config.eva_vit)
    make = lambda: EmotionLlama.init(*parts, with_encoder=False, rngs=nnx.Rngs(config.seed))
    model = init_sharded(make, mesh, ())
    flops = cost_of(model.llama).flops(amount.tokens, amount.tokens / amount.clips)

    peer = None if why_no_peer else _theirs(model, config, batches, amount)
    contenders = {OURS: _ours(model, config, batches, amount)}  # takes over the memory of what is trained
    notes = [
        f"a step: {amount.clips / amount.steps:.4g} clips of {amount.tokens / amount.clips:.0f} tokens, "
        f"{amount.targets / amount.clips:.3g} of them targets, on average, in {config.data.batch_rows} rows of "
        f"{config.data.sequence_length}",
        "image tokens are made beforehand, batches wait on the device: neither encoder nor data pipeline is measured",
        "fill: the share of positions that are not padding",
    ]
    if peer is None:
        notes.append(why_no_peer)
    else:
        contenders[PEER] = peer
        recomputes = "every block" if config.llama.remat != "none" else "nothing"
        notes.append(f"{PEER} has each clip in a row of its own, padded to the longest of the step")
        notes.append(f"{OURS} recomputes with remat={config.llama.remat}, {PEER} {recomputes}")
        notes += kernel_note(config.llama)
    per_step = round(amount.clips / amount.steps)
    results = alternate(contenders, batch=per_step, repeats=repeats, rate="clips_per_s")
    if peer is not None:
        notes.append(_check_first_steps(results, config))

    columns = dict(COLUMNS)
    if any("device_gib" in run for result in results for run in result.runs):
        columns["device_gib"] = "GiB"
    speed, note = add_speed(
        results,
        lambda result: flops,
        lambda run: run["seconds"],
        "the operations of the language model on tokens that are not padding, as in training's own report; "
        "recomputation does not count",
    )
    columns, notes = columns | speed, notes + note
    settings = {"tasks": "+".join(tasks), "steps": steps, "clips": clips, "repeats": repeats}
    return Report("Training on clips, random weights", to_dict(config), settings, columns, results, notes)


def _check(config: Config) -> None:
    check_one_device(config)
    if config.train.grad_accum_steps != 1:
        raise UserError(
            f"config.train.grad_accum_steps={config.train.grad_accum_steps}: bench takes batches whole; leave it at "
            "1, and give fewer config.data.batch_rows"
        )
    has_adapters = config.lora.rank and config.lora.targets
    if not [part for part in config.trainable if part != "lora" or has_adapters]:
        raise UserError("config.trainable: nothing to train; name parts that the model has")


# -- the batches


def make_batches(config: Config, clips: int, count: int) -> list[Batch]:
    """The first `count` batches that the training pipeline makes of so many synthetic clips."""
    with tempfile.TemporaryDirectory() as folder:
        path = _prepared(Path(folder), config, clips)
        data = dataclasses.replace(config.data, train=(f"{path}:train",), weights=(), workers=0)
        config = dataclasses.replace(config, data=data)
        with contextlib.closing(iter(train_dataset(config, Pieces(config.llama.vocab_size)))) as iterator:
            return list(itertools.islice(iterator, count))


def _prepared(folder: Path, config: Config, count: int) -> Path:
    """A data set of what is said and described in synthetic clips, with random numbers for what is seen and heard."""
    labels = config.prompt.labels
    shape = (1 + config.eva_vit.grid**2, config.eva_vit.hidden_size)
    size = config.projectors.feature_size
    recipe = Recipe(labels=labels, image_storage="image_tokens", image_tokens_shape=shape, feature_size=size)

    def clip_of(index: int) -> Clip:
        spec = clip_spec("train", index, config.seed)
        coarse, fine = describe(spec, "coarse"), describe(spec, "fine")
        return Clip(
            name=spec.name,
            split=spec.split,
            emotion=labels[index % len(labels)],
            subtitle=coarse["text"],
            caption_coarse=coarse["caption"],
            caption_fine=fine["smp_reason_caption"],
        )

    def make_parts(clips: Sequence[Clip], recipe: Recipe, folder: Path) -> list[Path]:
        rng, serialize = np.random.default_rng(config.seed), recipe.features().serialize_example
        noise = lambda *shape: rng.standard_normal(shape, np.float32)

        def record(clip: Clip) -> bytes:
            image = {"image_tokens": noise(*shape).astype(np.float16)}
            features = ClipFeatures(noise(3, size), np.ones(3, bool))
            return serialize(make_record(clip, recipe, clip.subtitle, features) | image)

        folder.mkdir(parents=True)
        write_part(folder / "part", [record(clip) for clip in clips])
        return [folder / "part"]

    annotations = Annotations(tuple(map(clip_of, range(count))), ())
    return prepare("clips", annotations, folder, recipe, make_parts).path


def amount_of(batches: Sequence[Batch]) -> Amount:
    total = lambda count: sum(int(count(batch)) for batch in batches)
    return Amount(
        steps=len(batches),
        clips=total(lambda batch: batch.clip_mask.sum()),
        tokens=total(lambda batch: (batch.segment_ids > 0).sum()),
        targets=total(lambda batch: (batch.loss_weights > 0).sum()),
    )


# -- the contenders


def _ours(model: EmotionLlama, config: Config, batches: Sequence[Batch], amount: Amount) -> Measure:
    mesh, optimizer = first_device(), make_optimizer(config.train)
    graphdef, frozen, state = placed_state(model, optimizer, config, mesh)
    on_device, rng = jax.device_put((list(batches), jax.random.key(config.seed)), NamedSharding(mesh, PartitionSpec()))
    step = make_step(graphdef, optimizer, multimodal_loss, mesh=mesh)
    positions, steps, compiled = sum(batch.tokens.size for batch in batches), [], None

    def measure():
        nonlocal state, compiled
        compiled = compiled or step.lower(state, frozen, on_device[0], rng).compile()
        found, start = [], time.perf_counter()
        for batch in on_device:
            state, metrics = compiled(state, frozen, batch, rng)
            found.append(metrics)
        jax.block_until_ready(state)
        seconds = time.perf_counter() - start
        steps.extend(Step(float(metrics["loss"]), float(metrics["grad_norm"])) for metrics in found)
        memory = {name: value for name, value in peak_memory().items() if name == "device_gib"}
        return amount.figures(positions, seconds) | memory, steps

    return measure


def _theirs(model: EmotionLlama, config: Config, batches: Sequence[Batch], amount: Amount) -> Measure:
    import torch

    peer, steps = TorchTraining(model, config), []
    padded = [one_clip_a_row(batch, soft_tokens_per_clip(config)) for batch in batches]
    on_device = [{name: torch.tensor(x, device=peer.device) for name, x in batch.items()} for batch in padded]
    positions, on_cuda = sum(batch["tokens"].size for batch in padded), peer.device.type == "cuda"

    def measure():
        start = time.perf_counter()
        found = [peer.step(batch) for batch in on_device]
        if on_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        steps.extend(Step(float(loss), float(norm)) for loss, norm in found)
        memory = {"device_gib": torch.cuda.max_memory_allocated() / 2**30} if on_cuda else {}
        return amount.figures(positions, seconds) | memory, steps

    return measure


def _check_first_steps(results: Sequence[Result], config: Config) -> str:
    """A note of the first steps. Raises RuntimeError where they differ."""
    first = {result.who: result.output[0] for result in results}
    told = ", ".join(f"{who} {step.loss:.5f} and {step.grad_norm:.5f}" for who, step in first.items())
    ours, theirs, half = first[OURS], first[PEER], config.llama.compute_dtype != "float32"
    loss_tolerance = ROUGH_TOLERANCE if half else LOSS_TOLERANCE
    norm_tolerance = ROUGH_TOLERANCE if half or config.lora.dropout else NORM_TOLERANCE
    same_loss = abs(ours.loss - theirs.loss) <= loss_tolerance
    if not (same_loss and abs(ours.grad_norm - theirs.grad_norm) <= norm_tolerance * theirs.grad_norm):
        raise RuntimeError(f"not the same training: loss and gradient's norm of the first step are {told}")
    return f"loss and gradient's norm of the first step: {told}"

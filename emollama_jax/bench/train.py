"""Benchmark of training on clips: the whole step, from packed batches to new adapters and projectors.

Ours is the step of `emollama train` on batches of its own pipeline. The peer works as the original does: the same
clips, each in a row of its own, padded to the longest of the batch. Both start from the same weights, and it is an
error if their first steps differ.

Neither runs the encoder of the frame, which would dominate the time: the clips have image tokens, as data prepared with
`--image image_tokens` has. On request ours runs it in the step, on random frames, without a peer. Image tokens and
features are random; subtitles are those of synthetic clips, and captions describe these, with realistic lengths. Texts
are cut into pieces of four letters (see `predict.py`).

Axes: B rows, T positions, K clips a row.
"""

import contextlib
import dataclasses
import itertools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from emollama_jax.bench.peer import PEER, obstacle
from emollama_jax.bench.predict import Pieces
from emollama_jax.bench.report import (
    OURS,
    Figures,
    Report,
    add_speed,
    alternate,
    check_one_device,
    random_emotion_llama,
)
from emollama_jax.bench.train_peer import TorchTraining, one_clip_a_row
from emollama_jax.bench.training import check_first_steps, ms_per_step, our_steps, peer_steps
from emollama_jax.config import Config, to_dict
from emollama_jax.data.annotations import Annotations, Clip
from emollama_jax.data.batch import Batch, Images, batch_spec, soft_tokens_per_clip
from emollama_jax.data.parts import ClipFeatures, make_record, write_part
from emollama_jax.data.pipeline import train_dataset
from emollama_jax.data.prepare import prepare
from emollama_jax.data.recipe import Recipe
from emollama_jax.errors import UserError
from emollama_jax.synthetic.clip import clip_spec
from emollama_jax.synthetic.dataset import describe
from emollama_jax.train.speed import cost_of, encoder_flops
from emollama_jax.train.step import multimodal_loss

COLUMNS = {"clips_per_s": "clips/s", "targets_per_s": "targets/s", "fill_percent": "fill %", "ms_per_step": "ms/step"}


class Amount(NamedTuple):
    """Totals over the batches."""

    steps: int
    clips: int
    tokens: int
    targets: int

    def figures(self, positions: int) -> Figures:
        """Of one pass through them, in rows of so many positions, padding included."""
        return {**self._asdict(), "fill_percent": 100 * self.tokens / positions}


def bench_train(
    config: Config,
    *,
    steps: int = 1,
    clips: int = 64,
    tasks: Sequence[str] = ("emotion", "reason"),
    repeats: int = 3,
    with_peer: bool = True,
    images: Images = "image_tokens",
    trace: Path | None = None,
) -> Report:
    """Steps on batches of `config.data.batch_rows` rows; a repeat is `steps` of them, on as many batches.

    Args:
        images: what the batches hold; of `frames` the encoder is a part of the step, and there is no peer.
        trace: a folder for the profiler's trace of one more repeat.
        clips: synthetic clips that the batches are drawn from; when all were drawn, they are drawn again.
        tasks: what is asked about them, in place of `config.prompt.tasks`.

    Raises:
        RuntimeError: the first steps of both differ.
    """
    _check(config)
    config = dataclasses.replace(config, prompt=dataclasses.replace(config.prompt, tasks=tuple(tasks), task_weights=()))
    encodes = images == "frames"
    why_no_peer = obstacle("torch", "transformers", "peft", wanted=with_peer)
    if encodes:
        why_no_peer = "no peer: it has image tokens; emollama bench encode measures the encoder beside it"
    batches = make_batches(config, clips, steps)
    amount = amount_of(batches)
    model = random_emotion_llama(config, with_encoder=encodes)
    cost = cost_of(model.llama)
    flops = cost.flops(amount.tokens, amount.tokens / amount.clips)
    if encodes:
        batches = with_frames(batches, config)
        flops += amount.clips * encoder_flops(model.eva_vit, 0)

    peer = None
    if not why_no_peer:
        rows = [one_clip_a_row(batch, soft_tokens_per_clip(config)) for batch in batches]
        figures = amount.figures(sum(part["tokens"].size for part in rows))
        peer = peer_steps(TorchTraining(model.llama, config, model.projectors), rows, figures)
    figures = amount.figures(sum(batch.tokens.size for batch in batches))
    ours = our_steps(model, config, multimodal_loss, batches, figures)
    notes = [
        f"a step: {amount.clips / amount.steps:.4g} clips of {amount.tokens / amount.clips:.0f} tokens, "
        f"{amount.targets / amount.clips:.3g} of them targets, on average, in {config.data.batch_rows} rows of "
        f"{config.data.sequence_length}",
        "batches wait on the device, the data pipeline is not measured; "
        + ("frames are encoded in the step" if encodes else "image tokens are made beforehand"),
        "fill: the share of positions that are not padding",
    ]
    results = alternate(
        {OURS: ours, PEER: peer},
        batch=round(amount.clips / amount.steps),
        repeats=repeats,
        derive=ms_per_step,
        trace=trace,
    )
    if peer is None:
        notes.append(why_no_peer)
    else:
        notes.append(f"{PEER} has each clip in a row of its own, padded to the longest of the step")
        notes += check_first_steps(results, config)

    columns = dict(COLUMNS)
    if any("device_gib" in run for result in results for run in result.runs):
        columns["device_gib"] = "GiB"
    speed, note = add_speed(
        results,
        lambda result: flops,
        "the operations of the language model on tokens that are not padding, as in training's own report"
        f"{', and those of the encoder' if encodes else ''}; recomputation does not count",
        flops_4n=cost.flops_4n(amount.tokens),
    )
    columns, notes = columns | speed, notes + note
    settings = {"tasks": "+".join(tasks), "images": images, "steps": steps, "clips": clips, "repeats": repeats}
    settings["attention"] = model.llama.config.attention
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


def with_frames(batches: Sequence[Batch], config: Config) -> list[Batch]:
    """The batches with random frames in place of their image tokens."""
    frames = batch_spec(config, images="frames").frames
    random = np.random.default_rng(config.seed)
    make = lambda: random.integers(0, 256, frames.shape, frames.dtype)
    return [dataclasses.replace(batch, image_tokens=None, frames=make()) for batch in batches]


def _prepared(folder: Path, config: Config, count: int) -> epath.Path:
    """A data set with subtitles and captions of synthetic clips, and random image tokens and features."""
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
            caption_coarse=_long_caption(coarse),
            caption_fine=f"{_long_caption(fine)} {fine['smp_reason_caption']}",
        )

    def make_parts(clips: Sequence[Clip], recipe: Recipe, folder: epath.Path) -> list[epath.Path]:
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


def _long_caption(clip: Mapping[str, Any]) -> str:
    """A caption as long as MERR's, of an entry of its files."""
    seen, heard = ", ".join(clip["visual_prior_list"]), clip["audio_prior_list"]
    return f"The face shows {seen}. The person speaks in {heard}. The person says: {clip['text']}"


def amount_of(batches: Sequence[Batch]) -> Amount:
    total = lambda count: sum(int(count(batch)) for batch in batches)
    return Amount(
        steps=len(batches),
        clips=total(lambda batch: batch.clip_mask.sum()),
        tokens=total(lambda batch: (batch.segment_ids > 0).sum()),
        targets=total(lambda batch: (batch.loss_weights > 0).sum()),
    )

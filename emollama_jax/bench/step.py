"""Benchmark of LoRA training steps on text: forward, backward and AdamW."""

import dataclasses
from pathlib import Path

import numpy as np

from emollama_jax.bench.peer import PEER, obstacle
from emollama_jax.bench.report import OURS, Report, add_speed, alternate, check_one_device, random_llama
from emollama_jax.bench.train_peer import TorchTraining
from emollama_jax.bench.training import check_first_steps, ms_per_step, our_steps, peer_steps
from emollama_jax.config import Config, to_dict
from emollama_jax.data.batch import Batch
from emollama_jax.errors import UserError
from emollama_jax.train.speed import cost_of
from emollama_jax.train.step import text_loss

COLUMNS = {"tokens_per_s": "tokens/s", "ms_per_step": "ms/step"}


def bench_step(
    config: Config,
    *,
    batch: int = 1,
    length: int = 256,
    repeats: int = 3,
    with_peer: bool = True,
    trace: Path | None = None,
) -> Report:
    """Steps on `batch` rows of `length` (2 or more) random tokens, every one but a row's first a target.

    Args:
        trace: a folder for the profiler's trace of one more call.

    Raises:
        RuntimeError: the first steps of both differ.
    """
    check_one_device(config)
    if not (config.lora.rank and config.lora.targets):
        raise UserError("config.lora: no adapters, nothing to train; set config.lora.rank and config.lora.targets")
    config = dataclasses.replace(config, trainable=("lora",))
    why_no_peer = obstacle("torch", "transformers", "peft", wanted=with_peer)
    model, rows = random_llama(config, config.lora), _random_rows(config, batch, length)
    cost, figures = cost_of(model), {"tokens": batch * length, "steps": 1}
    peer = None
    if not why_no_peer:
        integers = {"tokens": rows.tokens.astype(np.int64), "attention_mask": np.ones((batch, length), np.int64)}
        peer = peer_steps(TorchTraining(model, config), [integers | {"loss_weights": rows.loss_weights}], figures)
    contenders = {OURS: our_steps(model, config, text_loss, [rows], figures), PEER: peer}
    results = alternate(contenders, batch=batch, repeats=repeats, rate="tokens_per_s", derive=ms_per_step, trace=trace)
    notes = ["ms/step: loss, gradients of the adapters and AdamW"]
    compare_norms = not config.lora.dropout
    notes += [why_no_peer] if why_no_peer else check_first_steps(results, config, compare_norms=compare_norms)
    speed, note = add_speed(
        results,
        lambda result: cost.flops(batch * length, length),
        "per token 4 for each frozen weight (2 forward, 2 backward to the activations), 6 for each of the adapters and "
        "causal attention; recomputation does not count",
        flops_4n=cost.flops_4n(batch * length),
    )
    settings = {"length": length, "repeats": repeats, "attention": model.config.attention}
    columns = COLUMNS | speed
    return Report("LoRA training step, random weights", to_dict(config), settings, columns, results, notes + note)


def _random_rows(config: Config, batch: int, length: int) -> Batch:
    tokens = np.random.default_rng(config.seed).integers(0, config.llama.vocab_size, (batch, length), np.int32)
    columns = np.arange(length, dtype=np.int32)
    return Batch(
        tokens=tokens,
        soft_index=np.full_like(tokens, -1),
        segment_ids=np.ones_like(tokens),
        positions=np.tile(columns, (batch, 1)),
        loss_weights=np.tile((columns < length - 1).astype(np.float32), (batch, 1)),
    )

"""Training: how fast a LoRA step is, forward, backward and AdamW."""

import time
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from emollama_jax.bench.peer import PEER, add_adapters, kernel_note, obstacle, torch_llama
from emollama_jax.bench.report import OURS, Figures, Measure, Report, add_speed, alternate, check_one_device
from emollama_jax.config import Config, to_dict
from emollama_jax.data.batch import Batch
from emollama_jax.errors import UserError
from emollama_jax.models.llama import Llama
from emollama_jax.sharding import init_sharded
from emollama_jax.train.speed import cost_of
from emollama_jax.train.step import init_state, make_step, text_loss
from emollama_jax.weights.engine import first_device

COLUMNS = {"tokens_per_s": "tokens/s", "ms_per_step": "ms/step"}
LEARNING_RATE = 1e-4


def bench_step(
    config: Config, *, batch: int = 1, length: int = 256, repeats: int = 3, with_peer: bool = True
) -> Report:
    """Steps on `batch` rows of `length` (2 or more) random tokens, every one but a row's first a target."""
    check_one_device(config)
    if not (config.lora.rank and config.lora.targets):
        raise UserError("config.lora: no adapters, nothing to train; set config.lora.rank and config.lora.targets")
    why_no_peer = obstacle("torch", "transformers", "peft", wanted=with_peer)
    mesh = first_device()
    llama = config.llama.for_devices(mesh.devices.flat)
    model = init_sharded(lambda: Llama(llama, config.lora, rngs=nnx.Rngs(config.seed)), mesh, ())
    tokens = np.random.default_rng(config.seed).integers(0, config.llama.vocab_size, (batch, length), np.int32)
    flops = flops_per_step(model, batch, length)
    peer = None if why_no_peer else add_adapters(torch_llama(model), model, config.lora)

    contenders = {OURS: _ours(model, tokens, config.seed)}  # takes the adapters' memory over, so after their copy
    notes = ["ms/step: loss, gradients of the adapters and AdamW"]
    if peer is None:
        notes.append(why_no_peer)
    else:
        recomputes = config.llama.remat == "full"
        contenders[PEER] = _peers(peer, tokens, recomputes)
        notes.append(
            f"{OURS} recomputes with remat={config.llama.remat}, {PEER} {'every block' if recomputes else 'nothing'}"
        )
        notes += kernel_note(config.llama)
    results = alternate(contenders, batch=batch, repeats=repeats)
    if peer is not None:
        losses = ", ".join(f"{result.who} {result.output[0]:.5f}" for result in results)
        notes.append(f"loss of the first step: {losses}")

    speed, note = add_speed(
        results,
        lambda result: flops,
        lambda run: run["ms_per_step"] / 1e3,
        "per token 4 for each frozen weight (2 forward, 2 backward to the activations), 6 for each of the adapters and "
        "causal attention; recomputation does not count",
    )
    settings, columns = {"length": length, "repeats": repeats}, COLUMNS | speed
    return Report("LoRA training step, random weights", to_dict(config), settings, columns, results, notes + note)


def flops_per_step(model: Llama, batch: int, length: int) -> float:
    """What the mathematics asks for, on rows of one sequence each."""
    return cost_of(model).flops(batch * length, length)


def _ours(model: Llama, tokens: np.ndarray, seed: int) -> Measure:
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=0)
    graphdef, frozen, state = init_state(model, optimizer)
    step = make_step(graphdef, optimizer, text_loss, mesh=first_device())
    columns = np.arange(tokens.shape[1], dtype=np.int32)
    batch = Batch(
        tokens=tokens,
        soft_index=np.full_like(tokens, -1),
        segment_ids=np.ones_like(tokens),
        positions=np.tile(columns, (tokens.shape[0], 1)),
        loss_weights=np.tile((columns < tokens.shape[1] - 1).astype(np.float32), (tokens.shape[0], 1)),
    )
    batch, rng, losses = jax.device_put(batch), jax.random.key(seed), []

    def measure():
        nonlocal state
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, frozen, batch, rng))
        seconds = time.perf_counter() - start
        losses.append(float(metrics["loss"]))
        return _figures(tokens, seconds), losses

    return measure


def _peers(peer: Any, tokens: np.ndarray, recomputes: bool) -> Measure:
    import torch

    if recomputes:
        peer.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [parameter for parameter in peer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=0)
    inputs, losses = torch.tensor(tokens, dtype=torch.int64, device=peer.device), []

    def measure():
        start = time.perf_counter()
        loss = peer(input_ids=inputs, labels=inputs, use_cache=False).loss  # the labels are shifted within
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if inputs.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        losses.append(loss.item())
        return _figures(tokens, seconds), losses

    return measure


def _figures(tokens: np.ndarray, seconds: float) -> Figures:
    return {"tokens": tokens.size, "ms_per_step": 1e3 * seconds, "tokens_per_s": tokens.size / seconds}

"""Benchmark of greedy decoding with a key/value cache.

The adapters are left out: once merged into their kernels they cost nothing.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from emollama_jax.bench.peer import PEER, generate_greedily, kernel_note, obstacle, torch_llama
from emollama_jax.bench.report import (
    OURS,
    Figures,
    Measure,
    Report,
    alternate,
    check_one_device,
    random_llama,
    stored_bytes,
)
from emollama_jax.config import Config, GenerateConfig, to_dict
from emollama_jax.infer.shapes import bucket
from emollama_jax.infer.slots import GenerationRequest, SlotBatcher
from emollama_jax.models.llama import Llama
from emollama_jax.train.speed import device_peak_flops

COLUMNS = {"tokens_per_s": "tokens/s", "prefill_ms": "prefill ms", "ms_per_token": "ms/token"}


def bench_decode(
    config: Config,
    *,
    batch_sizes: Sequence[int] = (1, 8),
    prompt: int = 32,
    new_tokens: int = 64,
    repeats: int = 3,
    with_peer: bool = True,
    trace: Path | None = None,
) -> Report:
    """Answers of `new_tokens` (2 or more) tokens to random prompts of `prompt` tokens, at several batch sizes.

    Args:
        trace: a folder for the profiler's traces of one more call at each batch size.
    """
    check_one_device(config)
    notes = ["tokens/s is of whole answers, prompts included; ms/token is one more token of every row"]
    why_no_peer = obstacle("torch", "transformers", wanted=with_peer)
    model = random_llama(config)
    peer = None if why_no_peer else torch_llama(model)
    notes += [why_no_peer] if why_no_peer else kernel_note(config.llama)

    results, columns = [], dict(COLUMNS)
    for batch in batch_sizes:
        prompts = np.random.default_rng(config.seed).integers(0, config.llama.vocab_size, (batch, prompt)).tolist()
        theirs = _peers(peer, prompts, new_tokens) if peer is not None else None
        contenders = {OURS: _ours(model, prompts, new_tokens), PEER: theirs}
        folder = trace and trace / f"batch-{batch}"
        measured = alternate(contenders, batch=batch, repeats=repeats, rate="tokens_per_s", trace=folder)
        if peer is not None:
            ours, theirs = (np.array(result.output) for result in measured)
            notes.append(f"batch {batch}: {np.mean(ours == theirs):.1%} of the tokens are the same from both")
        results += measured
    if peak := device_peak_flops(jax.devices()[0].device_kind):
        columns |= {"gb_per_token": "GB/token", "bandwidth_percent": "% bandwidth"}
        notes.append(
            f"GB/token is all weights and the whole cache; the bandwidth is {peak.bytes_per_s / 1e9:,.0f} GB/s"
        )
        for result in results:
            read = bytes_per_token(model, result.batch, bucket(prompt + new_tokens - 1))
            for run in result.runs:
                run["gb_per_token"] = read / 1e9
                run["bandwidth_percent"] = 100 * read / (run["ms_per_token"] / 1e3 * peak.bytes_per_s)
    settings = {"prompt": prompt, "new_tokens": new_tokens, "repeats": repeats, "attention": model.config.attention}
    return Report("Greedy decoding, random weights", to_dict(config), settings, columns, results, notes)


def bytes_per_token(model: Llama, batch: int, slots: int) -> int:
    """Bytes read to decode one token of every row: the weights (without an untied embedding) and the cache."""
    config = model.config
    cache = 2 * config.num_layers * batch * slots * config.num_kv_heads * config.head_dim
    embedding = 0 if config.tie_embeddings else stored_bytes(model.embed)
    return stored_bytes(model) - embedding + cache * np.dtype(config.compute_dtype).itemsize


def _ours(model: Llama, prompts: list[list[int]], new_tokens: int) -> Measure:
    def seconds(limit: int) -> tuple[float, list[list[int]]]:
        batcher, config = SlotBatcher(model, (), slots=len(prompts)), GenerateConfig(max_new_tokens=limit)
        start = time.perf_counter()
        answers = batcher.run(GenerationRequest(prompt, config) for prompt in prompts)
        return time.perf_counter() - start, [list(answer.tokens) for answer in answers]

    def measure():
        first_s, _ = seconds(1)
        total_s, answers = seconds(new_tokens)
        return _figures(answers, first_s, total_s), answers

    return measure


def _peers(peer: Any, prompts: list[list[int]], new_tokens: int) -> Measure:
    import torch

    inputs, stamps = torch.tensor(prompts, device=peer.device), []
    never = torch.zeros(len(prompts), dtype=torch.bool, device=peer.device)

    def stamp(tokens, scores, **_):
        """A stopping criterion, called after every token, that records the time of the first one."""
        if not stamps:
            tokens[0, -1].item()  # waits for the device
            stamps.append(time.perf_counter())
        return never

    def measure():
        stamps.clear()
        start = time.perf_counter()
        answers = generate_greedily(peer, new_tokens, input_ids=inputs, stopping_criteria=[stamp])
        return _figures(answers, stamps[0] - start, time.perf_counter() - start), answers

    return measure


def _figures(answers: list[list[int]], first_s: float, total_s: float) -> Figures:
    """Figures from the seconds until the first and the last token of all answers."""
    return {
        "tokens": sum(map(len, answers)),
        "seconds": total_s,
        "prefill_ms": 1e3 * first_s,
        "ms_per_token": 1e3 * (total_s - first_s) / (len(answers[0]) - 1),
    }

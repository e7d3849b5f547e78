"""Benchmark of answers of very different lengths: continuous batching beside batches that run until all answers end.

Prompts are random tokens. The lengths of the answers are evenly spaced on a logarithmic scale, in a random order, and
not known to the batcher in advance.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from emollama_jax.bench.peer import PEER, generate_greedily
from emollama_jax.bench.report import OURS, Figures, Measure, Result, alternate
from emollama_jax.config import GenerateConfig
from emollama_jax.infer import generate
from emollama_jax.infer.sampling import Sampling
from emollama_jax.infer.shapes import bucket
from emollama_jax.infer.slots import GenerationRequest, SlotBatcher
from emollama_jax.models.llama import Llama

LOCKSTEP = "lockstep batches"
REQUESTS, SLOTS, CHUNK, PROMPT_TOKENS = 24, 8, 8, 32
SHORTEST, LONGEST = 5, 200  # tokens of an answer


def measure_mixed_answers(
    model: Llama, peer: Any | None, *, repeats: int, longest: int = LONGEST
) -> tuple[list[Result], list[str]]:
    """Results and notes for ourselves, our model in lockstep batches, and the peer with one request at a time."""
    rng = np.random.default_rng(0)
    lengths = rng.permutation(np.geomspace(min(SHORTEST, longest), longest, REQUESTS).round().astype(int))
    prompts = rng.integers(0, model.config.vocab_size, (REQUESTS, PROMPT_TOKENS)).tolist()
    configs = [GenerateConfig(max_new_tokens=int(length)) for length in lengths]
    contenders = {
        OURS: _continuous(model, prompts, configs),
        LOCKSTEP: _lockstep(model, prompts, configs),
        PEER: _one_by_one(peer, prompts, configs) if peer is not None else None,
    }
    results = alternate(contenders, batch=SLOTS, repeats=repeats, what="answers", rate="tokens_per_s")
    ours, *others = results
    notes = [
        f"answers: {REQUESTS} texts of {PROMPT_TOKENS} tokens, {lengths.sum()} tokens in answers of {lengths.min()} to "
        f"{lengths.max()}, {SLOTS} at once; {PEER} has one at a time"
    ]
    for other in others:
        speed_up = ours.best["tokens_per_s"] / other.best["tokens_per_s"]
        same = np.mean(np.concatenate(ours.output) == np.concatenate(other.output))
        notes.append(f"answers: {speed_up:.2f}x {other.who}, {same:.1%} of the tokens are the same from both")
    return results, notes


def _continuous(model: Llama, prompts: Sequence[list[int]], configs: Sequence[GenerateConfig]) -> Measure:
    batcher = SlotBatcher(model, (), slots=SLOTS, chunk=CHUNK)

    return lambda: _counted([list(answer.tokens) for answer in batcher.run(map(GenerationRequest, prompts, configs))])


def _lockstep(model: Llama, prompts: Sequence[list[int]], configs: Sequence[GenerateConfig]) -> Measure:
    """Batches of requests in their order, one batch after another."""
    size, no_eos = bucket(PROMPT_TOKENS + max(c.max_new_tokens for c in configs) - 1), jnp.zeros(0, jnp.int32)

    def batch_answers(part: slice) -> list[list[int]]:
        tokens, sampling = np.array(prompts[part], np.int32), Sampling.of(configs[part], [0] * SLOTS)
        lengths, no_soft = np.full(SLOTS, PROMPT_TOKENS, np.int32), np.full_like(tokens, -1)
        parts = nnx.split(model)
        state = generate.prefill(*parts, tokens, lengths, no_soft, None, sampling, no_eos, cache_size=size)
        found = [np.asarray(state.token)[:, None]]
        while not np.asarray(state.done).all():
            state, new = generate.decode_chunk(*parts, state, no_eos, length=CHUNK)
            found.append(np.asarray(new))
        return [row[row >= 0].tolist() for row in np.concatenate(found, axis=1)]

    batches = [slice(i, i + SLOTS) for i in range(0, REQUESTS, SLOTS)]
    return lambda: _counted([answer for part in batches for answer in batch_answers(part)])


def _one_by_one(peer: Any, prompts: Sequence[list[int]], configs: Sequence[GenerateConfig]) -> Measure:
    import torch

    def answer(prompt: list[int], config: GenerateConfig) -> list[int]:
        inputs = torch.tensor([prompt], device=peer.device)
        return generate_greedily(peer, config.max_new_tokens, input_ids=inputs)[0]

    return lambda: _counted([answer(*request) for request in zip(prompts, configs, strict=True)])


def _counted(answers: list[list[int]]) -> tuple[Figures, list[list[int]]]:
    return {"tokens": sum(map(len, answers))}, answers

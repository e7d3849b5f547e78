"""The shapes that programs are compiled for: few, and for a server all of them beforehand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emollama_jax.config import GenerateConfig
from emollama_jax.features.encode import in_batches
from emollama_jax.infer.shapes import FixedShapes, GrowingShapes
from emollama_jax.infer.slots import SlotBatcher
from tests.compilations import compilations
from tests.infer.test_slots import ENDLESS, alone, random_requests
from tests.models.tiny import random_llama, tiny_config


@pytest.fixture(scope="module")
def model():
    model = random_llama(tiny_config())
    model.lm_head.kernel[...] = 4 * model.lm_head.kernel[...]
    return model


def test_batches_are_filled():
    for count in range(30):
        batches = in_batches(list(range(count)), (1, 4, 16))
        assert [thing for batch in batches for thing in batch] == list(range(count))
        assert {len(batch) for batch in batches} <= {1, 4, 16}
    assert [len(batch) for batch in in_batches("abcdefg")] == [4, 1, 1, 1]


@pytest.mark.parametrize(
    ("prompts", "answers", "lengths", "caches"),
    [
        ((340, 2048), (500, 2048), (384, 768, 1536, 2048), (1024, 2048, 4096)),
        ((120, 256), (24, 256), (128, 256), (256, 512)),
        ((256, 256), (40, 256), (256,), (384, 512)),
    ],
)
def test_lengths_are_each_twice_the_last(prompts, answers, lengths, caches):
    shapes = FixedShapes.between(8, prompts=prompts, answers=answers)
    assert (shapes.prompts, shapes.caches) == (lengths, caches)
    for length in range(1, prompts[1] + 1):
        prompt = shapes.prompt(length)
        assert length <= prompt <= shapes.prefilled(prompt)
        assert shapes.cache(length + answers[1]) in caches


def test_rows():
    shapes = FixedShapes(6, (64,), (128,))
    assert [shapes.rows(count) for count in (1, 2, 6)] == [1, 6, 6] and shapes.sizes == (1, 4)
    assert [GrowingShapes().rows(count) for count in (1, 2, 3, 6)] == [1, 2, 4, 8]
    assert FixedShapes(2, (64,), (128,)).sizes == (1,)


@pytest.mark.parametrize("slots", [1, pytest.param(6, marks=pytest.mark.smoke)])
def test_nothing_compiles_while_requests_run(model, slots):
    """Requests come and go, some are dropped; each has the answer that it gets alone."""
    shapes = FixedShapes(slots, (32, 64), (64, 128))
    requests = random_requests(model, 16, shortest=1, longest=60, seed=3)
    soft = jnp.asarray(np.random.default_rng(0).normal(size=(3, model.config.hidden_size)), jnp.float32)
    requests = [dataclasses.replace(request, soft=jax.device_put(np.asarray(soft))) for request in requests]
    requests += [
        dataclasses.replace(requests[0], prompt=[7] * 50, config=GenerateConfig(max_new_tokens=n), logprobs=True)
        for n in (1, 9)
    ]
    answers = alone(model, ENDLESS, requests, max_length=128)
    batcher, rng = SlotBatcher(model, ENDLESS, slots=slots, chunk=4, shapes=shapes), np.random.default_rng(1)
    with compilations() as beforehand:
        for compile_some in batcher.programs(soft):
            compile_some()
    order, found, dropped = rng.permutation(len(requests)).tolist(), {}, {}
    with compilations() as meanwhile:
        numbers = {}
        while order or batcher.busy:
            for _ in range(min(len(order), rng.integers(0, 5))):
                i = order.pop()
                numbers[batcher.submit(requests[i])] = i
            if rng.random() < 0.1 and numbers:
                number = int(rng.choice(list(numbers)))
                dropped[number] = numbers[number]
                batcher.cancel(number)
            for event in batcher.step():
                if event.completion:
                    found[numbers[event.request]] = event.completion
    assert beforehand and not meanwhile
    assert all(answers[i] == answer for i, answer in found.items())
    assert len(found.keys() | set(dropped.values())) == len(requests)

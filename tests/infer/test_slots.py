"""Continuous batching: whatever joins and leaves beside a request, its answer is the one it gets alone."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from emollama_jax.config import GenerateConfig
from emollama_jax.errors import UserError
from emollama_jax.infer import generate
from emollama_jax.infer.slots import GenerationRequest, SlotBatcher
from emollama_jax.text.prompts import Sample
from tests.models.tiny import random_llama, tiny_config

VOCAB, ENDLESS = 97, (-7, -8)


@pytest.fixture(scope="module")
def model():
    """Its head is large, so that no two logits are near enough for the order of a sum to matter."""
    model = random_llama(tiny_config())
    model.lm_head.kernel[...] = 4 * model.lm_head.kernel[...]
    return model


def random_requests(model, count: int, *, shortest: int, longest: int, seed: int = 0) -> list[GenerationRequest]:
    """Prompts of 17 to 32 tokens, a third about clips, of all settings; answers of all lengths in between."""
    rng, requests = np.random.default_rng(seed), []
    for limit in rng.permutation(np.linspace(shortest, longest, count).astype(int)):
        tokens = rng.integers(0, VOCAB, rng.integers(17, 33))
        config = GenerateConfig(
            max_new_tokens=int(limit),
            temperature=float(rng.choice([0.0, 1.0, 3.0])),
            top_p=float(rng.choice([0.6, 0.95, 1.0])),
            repetition_penalty=float(rng.choice([1.0, 1.3])),
        )
        prompt, soft = tokens.tolist(), None
        if len(requests) % 3 == 0:
            soft_index = np.full(len(tokens), -1, np.int32)
            soft_index[1:4] = rng.permutation(3)
            prompt = Sample(tokens.astype(np.int32), soft_index, np.zeros(len(tokens), bool))
            soft = jnp.asarray(rng.normal(size=(3, model.config.hidden_size)), jnp.float32)
        requests.append(GenerationRequest(prompt, config, int(rng.integers(2**32)), soft))
    return requests


def alone(model, eos_ids, requests, **settings):
    return [SlotBatcher(model, eos_ids, slots=1, **settings).run([request])[0] for request in requests]


@pytest.fixture(scope="module")
def mix(model):
    """24 requests with answers of 5 to 200 tokens, and what each gets when it is alone."""
    requests = random_requests(model, 24, shortest=5, longest=200)
    answers = alone(model, ENDLESS, requests, max_length=256)  # few programs compile
    assert [len(answer.tokens) for answer in answers] == [request.config.max_new_tokens for request in requests]
    return requests, answers


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 4, 8])
def test_answers_are_the_same_in_any_order_of_arrival(model, mix, slots):
    requests, answers = mix
    order = np.random.default_rng(slots).permutation(len(requests))
    found = SlotBatcher(model, ENDLESS, slots=slots, max_length=256).run(requests[i] for i in order)
    assert found == [answers[i] for i in order]


def test_requests_join_a_running_batch(model):
    """One to three more at every step, with end-of-sequence ids that some answers meet; the cache grows meanwhile."""
    requests, eos_ids = random_requests(model, 12, shortest=3, longest=60, seed=1), (2, 3)
    answers = alone(model, eos_ids, requests)
    assert 0 < sum(answer.ended for answer in answers) < 12
    batcher, rng, events, waiting = SlotBatcher(model, eos_ids, slots=4, chunk=3), np.random.default_rng(1), [], 0
    while waiting < 12 or batcher.busy:
        for request in requests[waiting : waiting + rng.integers(1, 4)]:
            assert batcher.submit(request) == waiting
            waiting += 1
        events += batcher.step()
    for number, answer in enumerate(answers):
        own = [event for event in events if event.request == number]
        assert own[-1].completion == answer
        assert tuple(token for event in own for token in event.tokens) == answer.tokens
        assert not any(event.completion for event in own[:-1])


def test_no_slot_is_idle_while_requests_wait(model, mix, monkeypatch):
    requests, _ = mix
    batcher, real, calls = SlotBatcher(model, ENDLESS, slots=4, max_length=256), generate.decode_chunk, []

    def spy(graphdef, state, decode, *args, **kwargs):
        calls.append((decode.done.tolist(), len(batcher._waiting)))
        return real(graphdef, state, decode, *args, **kwargs)

    monkeypatch.setattr(generate, "decode_chunk", spy)
    batcher.run(requests)
    assert all(done == [False] * 4 for done, waiting in calls if waiting)
    assert all(sum(done) <= len(done) // 2 for done, _ in calls)  # the last requests run in a smaller batch
    assert len(calls[-1][0]) == 1


def test_a_cancelled_request_frees_its_slot_and_harms_no_other(model):
    requests = random_requests(model, 4, shortest=30, longest=40, seed=2)
    answers = alone(model, ENDLESS, requests)
    batcher = SlotBatcher(model, ENDLESS, slots=2)
    numbers = [batcher.submit(request) for request in requests]
    assert {event.request for event in batcher.step()} == {0, 1}
    batcher.cancel(numbers[0])
    batcher.cancel(numbers[3])  # which waits still
    batcher.cancel(99)
    events = batcher.step()
    assert {event.request for event in events} == {1, 2}
    while batcher.busy:
        events += batcher.step()
    found = {event.request: event.completion for event in events if event.completion}
    assert found == {1: answers[1], 2: answers[2]}
    assert batcher.run(requests[:1]) == answers[:1]
    last = batcher.submit(requests[0])
    batcher.step()
    batcher.cancel(last)
    assert not batcher.busy and batcher.step() == []


def test_a_request_longer_than_the_cache_is_refused(model):
    request = GenerationRequest([5] * 40, GenerateConfig(max_new_tokens=24))
    batcher = SlotBatcher(model, ENDLESS, max_length=64)
    for longer in (
        dataclasses.replace(request, prompt=[5] * 41),
        dataclasses.replace(request, config=GenerateConfig(max_new_tokens=25)),
    ):
        with pytest.raises(UserError, match="longer than max_length=64; shorten one of them, or raise max_length"):
            batcher.submit(longer)
    assert batcher.run([request]) == alone(model, ENDLESS, [request])


def test_a_chosen_length_needs_no_larger_cache(model, monkeypatch):
    real, sizes = generate.decode_chunk, set()

    def spy(graphdef, state, decode, *args, **kwargs):
        sizes.add(decode.cache.k.shape[2])
        return real(graphdef, state, decode, *args, **kwargs)

    requests = [GenerationRequest([5] * n, GenerateConfig(max_new_tokens=n)) for n in (4, 20, 50)]
    answers = alone(model, ENDLESS, requests)
    monkeypatch.setattr(generate, "decode_chunk", spy)
    assert SlotBatcher(model, ENDLESS, slots=2, max_length=128).run(requests) == answers
    assert sizes == {128}


def test_the_batcher_takes_the_weights_as_they_are(model):
    """Changed between two steps, they count from the next on."""
    request, changed = GenerationRequest([5, 6], GenerateConfig(max_new_tokens=20)), random_llama(tiny_config())
    batcher = SlotBatcher(changed, ENDLESS)
    before = batcher.run([request])
    changed.lm_head.kernel[...] = -changed.lm_head.kernel[...]
    assert batcher.run([request]) == alone(changed, ENDLESS, [request]) != before

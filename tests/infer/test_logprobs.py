"""How likely a token was, as the batcher tells it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emollama_jax.config import GenerateConfig
from emollama_jax.infer.slots import GenerationRequest, SlotBatcher
from tests.models.tiny import random_llama, tiny_config

ENDLESS = (-7, -8)


@pytest.fixture(scope="module")
def model():
    """Its head is large, so that no two logits are near each other."""
    model = random_llama(tiny_config())
    model.lm_head.kernel[...] = 4 * model.lm_head.kernel[...]
    return model


def test_tokens_come_with_their_log_probabilities(model):
    """Those of the whole text run once, in any company; a request that does not ask for them gets none."""
    requests = [GenerationRequest([5, 6, 7 + i], GenerateConfig(max_new_tokens=9), logprobs=i > 0) for i in range(3)]
    batcher, events = SlotBatcher(model, ENDLESS, slots=2, chunk=4), []
    for request in requests:
        batcher.submit(request)
    while batcher.busy:
        events += batcher.step()
    assert [one for event in events if event.request == 0 for one in event.logprobs] == []
    for number, request in enumerate(requests[1:], 1):
        own = [event for event in events if event.request == number]
        tokens = [token for event in own for token in event.tokens]
        found = [one for event in own for one in event.logprobs]
        text = jnp.asarray([[*request.prompt, *tokens]])
        hidden = model(model.embed_tokens(text), jnp.arange(text.shape[1])[None], jnp.ones_like(text))
        expected = np.asarray(jax.nn.log_softmax(model.logits(hidden)[0, 2:-1], axis=-1))
        assert len(found) == len(tokens) == 9
        for one, token, row in zip(found, tokens, expected, strict=True):
            assert one.logprob == pytest.approx(row[token], abs=1e-4)
            assert [i for i, _ in one.top] == np.argsort(-row, kind="stable")[: len(one.top)].tolist()
            np.testing.assert_allclose([value for _, value in one.top], np.sort(row)[::-1][: len(one.top)], atol=1e-4)

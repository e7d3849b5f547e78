"""What of a server needs none of its packages: its settings, the cache of clips, the text of an answer as it comes."""

import numpy as np
import pytest

from emollama_jax.errors import UserError
from emollama_jax.infer.clip_input import ClipInput
from emollama_jax.serve.answer_text import AnswerText
from emollama_jax.serve.cache import ClipCache, EncodedClip, Seen
from emollama_jax.serve.settings import ServeSettings
from emollama_jax.text.tokenizers import load_tokenizer
from tests.train.runs import LLAMA


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(LLAMA)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "host.example", "127.0.0.1.example"])
def test_an_address_that_others_reach_needs_a_key(host):
    with pytest.raises(UserError, match="give --api-key or EMOLLAMA_API_KEY, or --insecure"):
        ServeSettings(host=host)
    assert not ServeSettings(host=host, api_key="k").is_loopback
    assert not ServeSettings(host=host, insecure=True).is_loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_one_of_this_machine_needs_none(host):
    settings = ServeSettings(host=host, max_upload_mb=3, slots=2, max_queue=5)
    assert settings.is_loopback and settings.most_requests == 7
    assert settings.max_upload == 3_000_000 and settings.max_body > 4_000_000  # a clip in base64, and its text


def test_the_cache_drops_what_was_asked_about_longest_ago():
    clip = EncodedClip(ClipInput("a", "", np.zeros((3, 8), np.float32), np.ones(3, bool)), {}, Seen(None, None))
    cache = ClipCache(5 * clip.nbytes // 2)
    for key in "abac":
        cache.put(key, clip)
    assert (cache.get("a") is None, cache.get("b") is None, cache.get("c") is None) == (False, True, False)
    assert cache.nbytes == 2 * clip.nbytes > 0


@pytest.mark.smoke
@pytest.mark.parametrize("size", [1, 3, 100])
def test_the_text_of_an_answer_comes_in_pieces(tokenizer, size):
    tokens = tokenizer.encode("  Her brow is raised, and she smiles.  ")
    for stop, expected in (((), "Her brow is raised, and she smiles."), (("smi", "zz"), "Her brow is raised, and she")):
        text = AnswerText(tokenizer, stop)
        pieces = [text.push(tokens[i : i + size]) for i in range(0, len(tokens), size)] + [text.finish()]
        assert "".join(pieces) == expected and text.stopped == bool(stop)
        assert text.tokens == len(tokens) if not stop else text.tokens < len(tokens)

"""Generation against the whole text run anew for every token, and against Hugging Face's `generate`.

The models are random and tiny. The kernel of their head is large, so that no two logits are near enough for the order
of a sum to matter.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emollama_jax.config import DEFAULT_SHARDING, GenerateConfig
from emollama_jax.infer import generate
from emollama_jax.infer.sampling import Sampling, sample
from emollama_jax.infer.shapes import bucket
from emollama_jax.infer.slots import Completion, GenerationRequest, SlotBatcher
from emollama_jax.models.lora import LoRAConfig, merge
from emollama_jax.sharding import init_sharded, make_mesh, use_mesh
from emollama_jax.text.prompts import Sample
from tests.models.tiny import NO_ADAPTERS, random_llama, tiny_config

VOCAB, EOS = 97, (2, 3)
GREEDY = GenerateConfig(max_new_tokens=16)


class Generator:
    """Answers a list of prompts at once, each in a slot of its own."""

    def __init__(self, model, *, eos_ids, chunk=8):
        self._make = lambda slots: SlotBatcher(model, eos_ids, slots=slots, chunk=chunk)

    def generate(self, prompts, config=GREEDY, seeds=None, *, soft=None):
        return self._make(len(prompts)).run(requests_of(prompts, config, seeds, soft))

    def stream(self, prompts, config=GREEDY, seeds=None):
        batcher = self._make(len(prompts))
        for request in requests_of(prompts, config, seeds):
            batcher.submit(request)
        while batcher.busy:
            yield batcher.step()


def requests_of(prompts, config=GREEDY, seeds=None, soft=None):
    configs = [config] * len(prompts) if isinstance(config, GenerateConfig) else config
    soft = [None] * len(prompts) if soft is None else soft
    rows = zip(prompts, configs, seeds or [0] * len(prompts), soft, strict=True)
    return [GenerationRequest(*row) for row in rows]


def tiny_model(lora=NO_ADAPTERS, **changes):
    model = random_llama(tiny_config(**changes), lora)
    model.lm_head.kernel[...] = 4 * model.lm_head.kernel[...]
    return model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def generator(model):
    return Generator(model, eos_ids=EOS)


def random_prompts(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, length).tolist() for length in lengths]


def random_configs(count, seed=0, longest=16):
    rng = np.random.default_rng(seed)
    return [
        GenerateConfig(
            max_new_tokens=int(rng.integers(1, longest + 1)),
            temperature=float(rng.choice([0.0, 1.0, 3.0])),
            top_p=float(rng.choice([0.6, 0.95, 1.0])),
            repetition_penalty=float(rng.choice([1.0, 1.3])),
        )
        for _ in range(count)
    ]


@functools.partial(jax.jit, static_argnums=0)
def next_tokens(graphdef, state, tokens, lengths, seen, step, sampling):
    """The token after the first `lengths` of each row [B, T]; nothing is kept from the step before."""
    model = nnx.merge(graphdef, state)
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = model(model.embed_tokens(tokens), places, (places < lengths[:, None]).astype(jnp.int32))
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    return sample(model.logits(last), seen, jnp.broadcast_to(step, lengths.shape), sampling)


def recomputed(model, prompts, configs, seeds, eos_ids=EOS, width=64):
    """The same requests one token at a time, each from its whole text so far."""
    texts = [list(prompt) for prompt in prompts]
    sampling = Sampling.of(configs, seeds)
    for step in range(max(config.max_new_tokens for config in configs)):
        tokens, seen = np.zeros((len(texts), width), np.int32), np.zeros((len(texts), VOCAB), bool)
        for row, text in enumerate(texts):
            tokens[row, : len(text)], seen[row, text] = text, True
        lengths = np.array([len(text) for text in texts])
        inputs = map(jnp.asarray, (tokens, lengths, seen, step))
        new = next_tokens(*nnx.split(model), *inputs, sampling)
        for text, token in zip(texts, new.tolist(), strict=True):
            text.append(token)
    answers = []
    for prompt, text, config in zip(prompts, texts, configs, strict=True):
        answer = text[len(prompt) :][: config.max_new_tokens]
        end = next((i for i, token in enumerate(answer) if token in eos_ids), None)
        answers.append(Completion(tuple(answer[:end]), end is not None))
    return answers


def assert_varied(answers):
    """The answers differ, and none only repeats itself."""
    assert len({answer.tokens for answer in answers}) > 0.9 * len(answers)
    assert np.median([len(set(answer.tokens)) / max(1, len(answer.tokens)) for answer in answers]) > 0.5


@pytest.mark.parametrize("kv_heads", [6, 2], ids=["mha", "gqa"])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_as_if_the_whole_text_were_run_for_every_token(kv_heads, sampled):
    model = tiny_model(num_kv_heads=kv_heads)
    lengths = np.random.default_rng(1).permutation(np.arange(1, 41))
    prompts, seeds = random_prompts(lengths), list(range(100, 140))
    configs = random_configs(40, longest=20) if sampled else [GenerateConfig(max_new_tokens=20)] * 40
    answers = Generator(model, eos_ids=EOS).generate(prompts, configs, seeds)
    assert answers == recomputed(model, prompts, configs, seeds)
    assert_varied(answers)
    assert 0 < sum(answer.ended for answer in answers) < 40


@pytest.mark.smoke
def test_a_few_requests_as_if_run_anew_for_every_token(model, generator):
    prompts, configs, seeds = random_prompts([3, 16, 9, 1]), random_configs(4, seed=2), [5, 6, 7, 8]
    assert generator.generate(prompts, configs, seeds) == recomputed(model, prompts, configs, seeds)


def test_the_cache_in_bfloat16_gives_nearly_the_most_likely_tokens():
    """Sums of other shapes round otherwise in bfloat16, so the tokens may differ where logits are near."""
    model = tiny_model(compute_dtype="bfloat16")
    prompts = random_prompts(range(1, 17))
    answers = Generator(model, eos_ids=()).generate(prompts, GREEDY)
    tokens = np.zeros((16, 32), np.int32)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        tokens[row, : len(prompt) + 16] = [*prompt, *answer.tokens]
    places = jnp.broadcast_to(jnp.arange(32), tokens.shape)
    hidden = model(model.embed_tokens(jnp.asarray(tokens)), places, jnp.ones_like(places))
    logits = np.asarray(model.logits(hidden))
    for row, prompt in enumerate(prompts):
        said = slice(len(prompt) - 1, len(prompt) + 15)
        picked = np.take_along_axis(logits[row, said], tokens[row, 1:][said][:, None], axis=-1)[:, 0]
        assert np.all(picked >= logits[row, said].max(axis=-1) - 0.05 * logits.std())


def test_as_hugging_face_generates():
    torch = pytest.importorskip("torch")
    from tests.parity.torch_llama import from_torch, torch_llama

    config = tiny_config()
    theirs = torch_llama(config)
    generator = Generator(from_torch(theirs, config), eos_ids=EOS)
    prompts = random_prompts([5, 11, 1, 8], seed=3)
    ends = []
    for penalty in (1.0, 1.3):
        settings = {"max_new_tokens": 30, "repetition_penalty": penalty}
        for row, answer in enumerate(generator.generate(prompts, GenerateConfig(**settings))):
            prompt = torch.tensor([prompts[row]])  # alone: Hugging Face's penalty counts padding as text
            said = theirs.generate(prompt, do_sample=False, eos_token_id=list(EOS), pad_token_id=0, **settings)
            said = said[0, prompt.shape[1] :].tolist()
            ends.append(said[-1] in EOS)
            assert answer == Completion(tuple(said[:-1] if ends[-1] else said), ends[-1])
    assert set(ends) == {True, False}


def test_the_penalty_does_not_count_padding():
    """Which is made of token 0."""
    model, config = tiny_model(), GenerateConfig(max_new_tokens=16, repetition_penalty=2.0)
    generator, prompts = Generator(model, eos_ids=(-7, -8)), [[5, 6, 7]]
    likely = generator.generate(prompts, config)[0].tokens[0]
    assert likely not in (0, 5, 6, 7)
    model.lm_head.kernel[...] = model.lm_head.kernel[...].at[:, 0].set(1.01 * model.lm_head.kernel[:, likely])
    assert generator.generate(prompts, config)[0].tokens[0] == 0


# A request and those beside it.


@dataclasses.dataclass(frozen=True)
class Requests:
    """Nine requests, and what each gets when it is alone."""

    prompts: list[list[int]]
    configs: list[GenerateConfig]
    seeds: list[int]
    alone: list[Completion]

    def of(self, rows):
        return [[values[row] for row in rows] for values in (self.prompts, self.configs, self.seeds)]


@pytest.fixture(scope="module")
def requests(generator):
    prompts = random_prompts([7, 1, 16, 25, 12, 30, 2, 17, 16], seed=4)
    configs = random_configs(9, seed=4)
    seeds = [11, 0, 3, 3, 2**32 - 1, 9, 10, 11, 12]
    alone = [generator.generate([p], c, [s])[0] for p, c, s in zip(prompts, configs, seeds, strict=True)]
    assert_varied(alone)
    return Requests(prompts, configs, seeds, alone)


@pytest.mark.parametrize("count", range(2, 10))
def test_a_request_does_not_depend_on_those_beside_it(generator, requests, count):
    rng = np.random.default_rng(count)
    for _ in range(2):
        rows = rng.permutation(9)[:count].tolist()
        assert generator.generate(*requests.of(rows)) == [requests.alone[row] for row in rows]


def test_a_request_beside_itself_and_others(generator):
    prompts, config = random_prompts([5, 16, 9], seed=5), GenerateConfig(max_new_tokens=12, temperature=3.0)
    first, *_ = generator.generate(prompts[:1], config, [1])
    answers = generator.generate([prompts[0], prompts[1], prompts[0], prompts[0]], config, [1, 1, 1, 2])
    assert answers[0] == answers[2] == first
    assert answers[3] != first
    mixed = generator.generate([prompts[2], prompts[0], prompts[0]], [GREEDY, config, GREEDY], [7, 1, 7])
    assert mixed[1] == first
    assert mixed[2] != first


def test_seeds(generator):
    prompts, config = random_prompts([6] * 4, seed=6), GenerateConfig(max_new_tokens=16, temperature=3.0)
    answers = generator.generate(prompts, config)
    assert generator.generate(prompts, config) == answers
    assert generator.generate(prompts, config, [0] * 4) == answers
    of_seed = [generator.generate(prompts[:1] * 4, config, range(s, s + 4)) for s in (0, 4)]
    assert of_seed[0][0] == answers[0]
    assert len({answer.tokens for batch in of_seed for answer in batch}) == 8
    greedy = generator.generate(prompts[:1] * 4, GREEDY, range(4))
    assert len(set(greedy)) == 1


# Where answers end.


@pytest.fixture(scope="module")
def endless(model):
    """Four prompts and 16 tokens of each answer when nothing ends it."""
    prompts = random_prompts([9, 16, 4, 13], seed=7)
    answers = Generator(model, eos_ids=(-7, -8)).generate(prompts, GREEDY)  # as many ids as EOS: the same program
    assert [(len(answer.tokens), answer.ended) for answer in answers] == [(16, False)] * 4
    return prompts, [answer.tokens for answer in answers]


def cut(tokens, eos_ids, limit=16):
    """What is left of an endless answer."""
    end = next((i for i, token in enumerate(tokens[:limit]) if token in eos_ids), None)
    return Completion(tokens[:limit] if end is None else tokens[:end], end is not None)


def test_any_of_the_end_ids_ends_an_answer(model, endless):
    prompts, tokens = endless
    for eos_ids in [(tokens[0][5], tokens[1][10]), (tokens[2][1], tokens[3][15]), (tokens[0][0], tokens[1][1])]:
        answers = Generator(model, eos_ids=eos_ids).generate(prompts, GREEDY)
        assert answers == [cut(answer, eos_ids) for answer in tokens]
        assert any(answer.ended for answer in answers)
        assert not any(set(answer.tokens) & set(eos_ids) for answer in answers)


@pytest.mark.parametrize("count", [0, 3])
def test_however_many_end_ids(model, endless, count):
    prompts, tokens = endless
    eos_ids = [tokens[i % 4][7 + i] for i in range(count)]
    answers = Generator(model, eos_ids=eos_ids).generate(prompts, GREEDY)
    assert answers == [cut(answer, eos_ids) for answer in tokens]


def test_an_answer_that_ends_at_once_is_empty(model, endless):
    prompts, tokens = endless
    eos_ids = (tokens[0][0], -1)
    answers = Generator(model, eos_ids=eos_ids).generate(prompts, GREEDY)
    assert answers[0] == Completion((), True)
    assert answers == [cut(answer, eos_ids) for answer in tokens]
    assert Generator(model, eos_ids=eos_ids).generate(prompts[:1], GREEDY) == [Completion((), True)]


def test_limits(model, endless):
    prompts, tokens = endless
    generator = Generator(model, eos_ids=(-7, -8))
    for limits in ([1, 2, 16, 9], [16, 8, 1, 7], [1, 1, 1, 1]):
        configs = [GenerateConfig(max_new_tokens=limit) for limit in limits]
        answers = generator.generate(prompts, configs)
        assert answers == [Completion(t[:limit], False) for t, limit in zip(tokens, limits, strict=True)]


def test_an_end_id_as_the_last_token_allowed(model, endless):
    prompts, tokens = endless
    limit = next(i for i in range(1, 16) if tokens[0][i] not in tokens[0][:i])
    generator = Generator(model, eos_ids=(tokens[0][limit], -1))
    last, before = (generator.generate(prompts[:1], GenerateConfig(max_new_tokens=n))[0] for n in (limit + 1, limit))
    assert last == Completion(tokens[0][:limit], True)
    assert before == Completion(tokens[0][:limit], False)


def test_answers_do_not_depend_on_the_chunk(model, requests):
    rows = [0, 2, 4, 8]
    for chunk in (1, 3, 8):
        answers = Generator(model, eos_ids=EOS, chunk=chunk).generate(*requests.of(rows))
        assert answers == [requests.alone[row] for row in rows], chunk


@pytest.fixture
def decode_calls(monkeypatch):
    """The rows of every call of the decode program, and the tokens it decoded of its longest one."""
    calls, real = [], generate.decode_chunk

    def spy(*args, **kwargs):
        decode, out = real(*args, **kwargs)
        calls.append((len(out), int((np.asarray(out) >= 0).sum(axis=1).max())))
        return decode, out

    monkeypatch.setattr(generate, "decode_chunk", spy)
    return calls


def test_decoding_stops_when_all_are_done(model, endless, decode_calls):
    prompts, tokens = endless
    configs = [GenerateConfig(max_new_tokens=limit) for limit in (11, 3, 1, 2)]
    Generator(model, eos_ids=(-7, -8)).generate(prompts, configs)
    # The first token is the prefill's; one request is finished by it, and one is left for the second chunk.
    assert decode_calls == [(4, 8), (1, 2)]

    decode_calls.clear()
    Generator(model, eos_ids=(-7, -8)).generate(prompts, GenerateConfig(max_new_tokens=1))
    Generator(model, eos_ids=(tokens[0][0], -1)).generate(prompts[:1], GREEDY)
    assert decode_calls == []

    end = next(i for i in range(1, 16) if tokens[0][i] not in tokens[0][:i])
    Generator(model, eos_ids=(tokens[0][end], -1)).generate(prompts[:1], GREEDY)
    assert sum(steps for _, steps in decode_calls) == end


# Streaming.


@pytest.mark.parametrize("chunk", [3, 8])
def test_a_stream_is_the_answer_in_pieces(model, chunk):
    prompts, configs, seeds = random_prompts([3, 16, 9], seed=8), random_configs(3, seed=8), [1, 2, 3]
    configs[1] = dataclasses.replace(configs[1], max_new_tokens=16)
    generator = Generator(model, eos_ids=EOS, chunk=chunk)
    steps = list(generator.stream(prompts, configs, seeds))
    assert sorted(event.request for event in steps[0]) == [0, 1, 2]
    events = [event for step in steps for event in step]
    assert all(1 <= len(event.tokens) <= chunk + 1 or event.completion for event in events)
    for row, answer in enumerate(generator.generate(prompts, configs, seeds)):
        own = [event for event in events if event.request == row]
        assert tuple(token for event in own for token in event.tokens) == answer.tokens
        assert [event.completion for event in own] == [None] * (len(own) - 1) + [answer]


def test_a_stream_left_early_harms_nothing(generator, model):
    prompts, seeds, config = random_prompts([3, 9], seed=9), [1, 2], GenerateConfig(max_new_tokens=16, temperature=1.0)
    expected = generator.generate(prompts, config, seeds)
    stream = generator.stream(prompts, config, seeds)
    first = next(stream)
    stream.close()
    assert generator.generate(prompts, config, seeds) == expected
    one, other = (generator.stream(prompts, config, seeds) for _ in range(2))  # two at the same time
    pairs = list(zip(one, other, strict=True))
    assert all(a == b for a, b in pairs)
    assert pairs[0][0] == first


# Compiled programs.


def test_one_program_serves_all_lengths_of_a_bucket(model):
    generator = Generator(model, eos_ids=(1, 2, 3, 4), chunk=5)  # as no other test has them
    programs = (generate.prefill, generate.decode_chunk, generate.insert, generate.rearrange)
    sizes = lambda: [program._cache_size() for program in programs]

    def added(count, length, limits, **settings):
        before = sizes()
        configs = [GenerateConfig(max_new_tokens=limit, **settings) for limit in limits]
        generator.generate(random_prompts([length] * count), configs, list(range(count)))
        return [after - earlier for earlier, after in zip(before, sizes(), strict=True)]

    found = [added(4, 1, [20, 24, 20, 20])]
    for length, limit, count, temperature in [(16, 16, 4, 1.0), (9, 10, 3, 3.0), (2, 21, 4, 0.0)]:
        found.append(added(count, length, [limit] * count, temperature=temperature, top_p=0.9))
    assert [prefills for prefills, *_ in found] == [1, 0, 0, 0]
    assert sum(decodes for _, decodes, *_ in found) <= 3  # batches of four, two and one rows
    assert added(4, 17, [40] * 4)[0] == 1


def test_buckets():
    table = {
        **dict.fromkeys((1, 2, 15, 16), 16),
        **{17: 32, 32: 32, 33: 64, 64: 64, 65: 128, 128: 128, 129: 256, 256: 256},
        **{257: 384, 384: 384, 385: 512, 512: 512, 513: 768, 768: 768, 769: 1024, 1024: 1024},
        **{1025: 1536, 1536: 1536, 1537: 2048, 2049: 3072, 3073: 4096, 4097: 6144},
    }
    assert {length: bucket(length) for length in table} == table
    lengths = range(1, 5000)
    buckets = [bucket(length) for length in lengths]
    assert buckets == sorted(buckets)
    assert all(length <= b <= max(16, 2 * length) for length, b in zip(lengths, buckets, strict=True))
    assert all(b % 128 == 0 for b in buckets if b > 128)
    assert all(bucket(b) == b for b in buckets)
    assert len(set(buckets)) == 14


def test_prompts_and_answers_that_fill_their_slots(model):
    prompts, config = random_prompts([16, 15, 16, 1], seed=10), GenerateConfig(max_new_tokens=32)
    answers = Generator(model, eos_ids=(-7, -8)).generate(prompts, config)
    assert answers == recomputed(model, prompts, [config] * 4, [0] * 4, eos_ids=())
    assert [len(answer.tokens) for answer in answers] == [32] * 4


# Bad input.


def test_bad_input_is_named(model):
    batcher = SlotBatcher(model, EOS)
    for request, complaint in [
        (GenerationRequest([]), "the prompt is empty; begin it with the BOS id"),
        (GenerationRequest([1, VOCAB]), f"the prompt holds a token id outside the vocabulary of {VOCAB}"),
        (GenerationRequest([-1, 3]), f"the prompt holds a token id outside the vocabulary of {VOCAB}"),
        (GenerationRequest([1], seed=-1), "seed -1 must be at least 0 and below 2**32"),
        (GenerationRequest([1], seed=2**32), "seed 4294967296 must be at least 0 and below 2**32"),
    ]:
        with pytest.raises(ValueError) as error:
            batcher.submit(request)
        assert str(error.value) == complaint
    assert not batcher.busy


def test_no_requests_no_answers(model):
    assert SlotBatcher(model, EOS).run([]) == SlotBatcher(model, EOS).step() == []


# Other models.


def test_adapters_merged_or_not(generator):
    prompts, configs, seeds = random_prompts([5, 16, 9, 1], seed=12), random_configs(4, seed=12), [1, 2, 3, 4]
    model = tiny_model(LoRAConfig(rank=4))
    adapted = Generator(model, eos_ids=EOS)
    answers = adapted.generate(prompts, configs, seeds)
    assert answers == recomputed(model, prompts, configs, seeds)
    assert answers != generator.generate(prompts, configs, seeds)
    merge(model)
    assert adapted.generate(prompts, configs, seeds) == answers
    assert Generator(model, eos_ids=EOS).generate(prompts, configs, seeds) == answers


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_kernels(generator, kind):
    model = tiny_model(LoRAConfig(rank=4), kernel_dtype=kind)
    prompts, configs, seeds = random_prompts([5, 16, 9, 1], seed=13), random_configs(4, seed=13), [1, 2, 3, 4]
    quantised = Generator(model, eos_ids=EOS)
    answers = quantised.generate(prompts, configs, seeds)
    assert answers == quantised.generate(prompts, configs, seeds) == recomputed(model, prompts, configs, seeds)
    assert_varied(answers)  # of logits that are not finite the first token is taken


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() != 8, reason="needs eight devices")
def test_a_mesh_says_what_one_device_says(model, generator):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    sharded = init_sharded(tiny_model, mesh, DEFAULT_SHARDING)
    kernel = sharded.layers.attn.q_proj.kernel[...]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4  # over fsdp and tensor
    np.testing.assert_array_equal(sharded.lm_head.kernel[...], model.lm_head.kernel[...])
    for count in (1, 4):
        prompts, seeds = random_prompts(range(3, 3 + count), seed=14), list(range(count))
        configs = random_configs(count, seed=14)
        with use_mesh(mesh, DEFAULT_SHARDING):
            answers = Generator(sharded, eos_ids=EOS).generate(prompts, configs, seeds)
        assert answers == generator.generate(prompts, configs, seeds)


# --- clips ---


def sample_of(tokens, soft_at):
    """A prompt whose tokens at the places `soft_at` are soft ones, numbered from 0."""
    soft = np.full(len(tokens), -1, np.int32)
    soft[soft_at] = np.arange(len(soft_at))
    return Sample(np.where(soft < 0, tokens, 0).astype(np.int32), soft, np.zeros(len(tokens), bool))


def test_soft_tokens_are_read_as_the_embeddings_they_are(model, generator):
    """Soft tokens that are the embeddings of words give the answers that the words give, whatever the batch."""
    prompts = random_prompts([9, 30, 14])
    places = [[2, 5], [0, 29], [7, 8]]
    expected = generator.generate(prompts, GREEDY)
    samples = [sample_of(*pair) for pair in zip(prompts, places, strict=True)]
    words = np.array([[prompt[i] for i in at] for prompt, at in zip(prompts, places, strict=True)])
    soft = model.embed_tokens(jnp.asarray(words))
    assert generator.generate(samples, GREEDY, soft=soft) == expected
    assert generator.generate(samples[1:2], GREEDY, soft=soft[1:2]) == expected[1:2]
    assert generator.generate(samples, GREEDY, soft=soft[::-1]) != expected


def test_a_repetition_penalty_counts_a_texts_prompt_but_not_a_clips(model, generator):
    config = GenerateConfig(max_new_tokens=1)
    penalised = dataclasses.replace(config, repetition_penalty=1e6)
    prompts = random_prompts([200] * 8)
    first = [answer.tokens for answer in generator.generate(prompts, config)]
    said = [bool(tokens) and tokens[0] in prompt for tokens, prompt in zip(first, prompts, strict=True)]
    assert any(said)
    texts = [answer.tokens for answer in generator.generate(prompts, penalised)]
    assert all(text != tokens for text, tokens, was in zip(texts, first, said, strict=True) if was)
    soft = model.embed_tokens(jnp.asarray([prompt[:1] for prompt in prompts]))
    clips = generator.generate([sample_of(prompt, [0]) for prompt in prompts], penalised, soft=soft)
    assert [answer.tokens for answer in clips] == first


def test_soft_tokens_that_are_not_there(model, generator):
    sample, soft = sample_of([5, 6, 7], [0, 2]), model.embed_tokens(jnp.zeros((1, 1), jnp.int32))
    for given in (soft, None):
        with pytest.raises(ValueError, match="the prompt asks for soft token 1; give the clip's soft tokens"):
            generator.generate([sample], GREEDY, soft=given)

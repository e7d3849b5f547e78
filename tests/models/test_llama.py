"""The decoder by itself: packing, the cache, the memory of the loss, sizes, and its configuration."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx

from emollama_jax.models.attention import attention
from emollama_jax.models.llama import REMAT_POLICIES, Llama, LlamaConfig
from emollama_jax.models.lora import PROJECTIONS, LoRAConfig, is_adapter
from emollama_jax.sharding import abstract
from tests.models.tiny import close, random_llama, rows, tiny_config

LORA = LoRAConfig(rank=4, alpha=4.0)

# ---- packed rows

LENGTHS = (5, 3, 7)
PAD = None
# Rows of 18 tokens: which sample comes next, each `PAD` being one token of padding.
LAYOUTS = ([0, 1, 2, PAD, PAD, PAD], [PAD, 2, 0, PAD, PAD, 1], [PAD, PAD, PAD, 1, 2, 0], [1, 0, PAD, 2, PAD, PAD])


def packed(layout: list[int | None]):
    """Tokens, targets, positions and segment ids of one row, and the place of each of its samples."""
    random, row, places = np.random.default_rng(5), [], {}
    samples = [random.integers(0, 97, (2, length)) for length in LENGTHS]
    for segment, sample in enumerate(layout):
        if sample is PAD:
            row.append([[1], [1], [0], [0]])
        else:
            length = LENGTHS[sample]
            start = sum(len(part[0]) for part in row)
            places[sample] = slice(start, start + length)
            row.append([*samples[sample], range(length), [7 - segment] * length])  # ids need not rise along the row
    return np.concatenate(row, axis=1), places


@pytest.fixture(scope="module")
def run_packed():
    """(layouts, weights of the rows) -> hidden states, token losses, gradients of the adapters, places of samples."""
    graphdef, trained, frozen = nnx.split(random_llama(tiny_config(), LORA), is_adapter, ...)

    @jax.jit
    def run(batch, weights):
        tokens, targets, positions, segment_ids = jnp.moveaxis(batch, 1, 0)

        def loss(trained):
            model = nnx.merge(graphdef, trained, frozen)
            hidden = model(model.embed_tokens(tokens), positions, segment_ids)
            nll = model.token_nll(hidden, targets)
            return jnp.sum(nll * (segment_ids > 0) * weights[:, None]), (hidden, nll)

        gradients, outputs = jax.grad(loss, has_aux=True)(trained)
        return *outputs, gradients

    def of_layouts(layouts, weights=(1.0, 1.0, 1.0, 1.0)):
        batch, places = zip(*map(packed, layouts), strict=True)
        return *run(jnp.asarray(np.stack(batch)), jnp.asarray(weights)), places

    return of_layouts


def test_packed_samples_are_as_if_alone(run_packed):
    """Whatever else is in the row, in whatever order, and wherever the padding is."""
    alone = [[sample] + [PAD] * (18 - length) for sample, length in enumerate(LENGTHS)] + [[PAD] * 18]
    hidden_alone, nll_alone, gradients_alone, _ = run_packed(alone)
    assert np.all(np.isfinite(hidden_alone)) and np.all(np.isfinite(nll_alone))  # also where all is padding
    hidden, nll, _, places = run_packed(LAYOUTS)
    for row, samples in enumerate(places):
        assert len(samples) == len(LENGTHS)
        for sample, place in samples.items():
            own = slice(0, LENGTHS[sample])
            close(hidden[row, place], hidden_alone[sample, own], 1e-5, f"hidden states of {sample} in row {row}")
            close(nll[row, place], nll_alone[sample, own], 1e-5, f"losses of {sample} in row {row}")
        *_, gradients, _ = run_packed(LAYOUTS, np.eye(len(LAYOUTS))[row])
        for ours, expected in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradients_alone), strict=True):
            scale = np.max(np.abs(expected))
            close(ours / scale, expected / scale, 1e-5, f"a gradient of row {row}, relative")


def test_samples_would_mix_in_one_segment(run_packed):
    """The comparison above can fail: the same row without segments gives other hidden states."""
    model = random_llama(tiny_config(), LORA)
    (tokens, _, positions, segment_ids), places = packed(LAYOUTS[0])
    row = lambda x: jnp.asarray(x)[None]
    one_segment = model(model.embed_tokens(row(tokens)), row(positions), row(np.ones_like(segment_ids)))
    hidden, *_ = run_packed(LAYOUTS)
    assert np.max(np.abs(one_segment[0, places[1]] - hidden[0, places[1]])) > 0.1
    close(one_segment[0, places[0]], hidden[0, places[0]], 1e-4, "the first sample, which has nothing before it")


# ---- prefill and extend


class Runner:
    """A model's methods, compiled."""

    def __init__(self, model: Llama):
        graphdef, params = nnx.split(model)
        merged = lambda params: nnx.merge(graphdef, params)

        def forward(params, tokens, positions, segment_ids):
            model = merged(params)
            return model(model.embed_tokens(tokens), positions, segment_ids)

        def prefill(params, tokens, lengths):
            model = merged(params)
            return model.prefill(model.embed_tokens(tokens), lengths, cache_size=15)

        def extend(params, tokens, cache):
            model = merged(params)
            return model.extend(model.embed_tokens(tokens), cache)

        methods = [jax.jit(method) for method in (forward, prefill, extend)]
        self.forward, self.prefill, self.extend = (functools.partial(method, params) for method in methods)


@pytest.mark.parametrize("scan_layers", [pytest.param(True, marks=pytest.mark.smoke), False], ids=["scan", "unrolled"])
def test_prefill_and_extend_are_the_full_forward(scan_layers):
    """Prompts of 7 and 4 tokens, and 6 more tokens of each, one or three at a time, behind the row's own last."""
    config = tiny_config(scan_layers=scan_layers)
    run = Runner(random_llama(config, LORA))
    tokens, positions, _ = rows(config)
    lengths = jnp.array([7, 4])
    full = run.forward(tokens, positions, (positions < lengths[:, None] + 6).astype(int))

    hidden, cache = run.prefill(tokens[:, :7], lengths)
    for row, length in enumerate(lengths):
        close(hidden[row, :length], full[row, :length], 1e-5, f"prefill of row {row}")
    # What lies in slots not yet filled must not be seen.
    empty = (jnp.arange(15) >= lengths[:, None])[..., None, None]
    cache = dataclasses.replace(cache, k=jnp.where(empty, 9.0, cache.k), v=jnp.where(empty, 99.0, cache.v))
    for step in (1, 3):
        longer = cache
        for start in range(0, 6, step):
            places = lengths[:, None] + jnp.arange(start, start + step)
            hidden, longer = run.extend(jnp.take_along_axis(tokens, places, axis=1), longer)
            close(hidden, jnp.take_along_axis(full, places[..., None], axis=1), 1e-5, f"{step} tokens from {start} on")
        assert longer.length.tolist() == [13, 10] and longer.k.shape == (2, 2, 15, 2, 10)


def test_the_cache_has_the_dtype_of_the_activations():
    config = tiny_config(compute_dtype="bfloat16")
    model = random_llama(config)
    run = Runner(model)
    hidden, cache = run.prefill(rows(config)[0], jnp.array([13, 9]))
    hidden, cache = run.extend(jnp.full((2, 1), 13), cache)
    assert {hidden.dtype, cache.k.dtype, cache.v.dtype} == {jnp.dtype("bfloat16")}
    assert model.logits(hidden).dtype == jnp.float32


# ---- the loss


@pytest.mark.parametrize("loss_chunk", [1, 4, 13, 256])
def test_the_loss_does_not_depend_on_its_chunks(loss_chunk):
    config = tiny_config(loss_chunk=loss_chunk)
    model = random_llama(config)
    hidden = jax.random.normal(jax.random.key(0), (2, 13, 24))
    targets = rows(config)[0]
    nll = jax.jit(model.token_nll)(hidden, targets)
    expected = -jax.nn.log_softmax(model.logits(hidden))[jnp.arange(2)[:, None], jnp.arange(13), targets]
    close(nll, expected, 1e-5, "token losses")


@pytest.mark.parametrize("loss_chunk", [1, 4, 13, 256])
def test_the_loss_of_some_positions_is_the_same_without_the_others(loss_chunk):
    """And its gradient; rows may ask for all of their positions or for none."""
    config = tiny_config(loss_chunk=loss_chunk)
    model = random_llama(config)
    hidden = jax.random.normal(jax.random.key(0), (3, 13, 24))
    targets = jnp.concatenate([rows(config)[0]] * 2)[:3]
    where = jax.random.bernoulli(jax.random.key(1), 0.3, (3, 13)).at[1].set(False).at[2].set(True)
    all_of_them = lambda hidden: jnp.where(where, model.token_nll(hidden, targets), 0)
    asked = lambda hidden: model.token_nll(hidden, targets, where)
    np.testing.assert_array_equal(jax.jit(asked)(hidden)[~where], 0)
    close(jax.jit(asked)(hidden), jax.jit(all_of_them)(hidden), 1e-5, "token losses")
    gradient = lambda loss: jax.jit(jax.grad(lambda hidden: jnp.sum(loss(hidden) ** 2)))(hidden)
    close(gradient(asked), gradient(all_of_them), 1e-5, "gradients")


def test_the_head_is_not_kept_once_a_chunk():
    """Of the loss at some positions the backward pass needs one head, however many chunks there are."""

    def temporary_bytes(loss_chunk: int) -> tuple[int, int]:
        model = random_llama(tiny_config(vocab_size=8192, loss_chunk=loss_chunk))
        graphdef, state = nnx.split(model)
        where = jnp.ones((1, 64), bool)

        def loss(hidden, state):
            return nnx.merge(graphdef, state).token_nll(hidden, jnp.zeros((1, 64), jnp.int32), where).sum()

        compiled = jax.jit(jax.grad(loss)).lower(jnp.ones((1, 64, model.config.hidden_size)), state).compile()
        return compiled.memory_analysis().temp_size_in_bytes, 4 * 8192 * model.config.hidden_size

    (few, head), (many, _) = temporary_bytes(32), temporary_bytes(4)
    assert many < few + 2 * head


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_logits_and_loss_are_float32(dtype):
    config = tiny_config(**dict.fromkeys(("kernel_dtype", "param_dtype", "compute_dtype"), dtype))
    tokens, positions, segment_ids = rows(config)

    def run():
        model = Llama(config, LORA, rngs=nnx.Rngs(0))
        hidden = model(model.embed_tokens(tokens), positions, segment_ids)
        return hidden, model.logits(hidden), model.token_nll(hidden, tokens)

    hidden, logits, nll = jax.eval_shape(run)
    assert (hidden.dtype, logits.dtype, nll.dtype) == (jnp.dtype(dtype), jnp.float32, jnp.float32)
    assert (hidden.shape, logits.shape, nll.shape) == ((2, 13, 24), (2, 13, 97), (2, 13))


def trained_step(config: LlamaConfig, lora: LoRAConfig = LORA, batch: int = 2, length: int = 24) -> str:
    """The loss of a batch and its gradients of the adapters and the input, as a computation in JAX's notation."""
    graphdef, state = abstract(lambda: Llama(config, lora, rngs=nnx.Rngs(0)))
    trained, frozen = nnx.split_state(state, is_adapter, ...)

    def loss(trained, x, frozen, tokens, key):
        model = nnx.merge(graphdef, trained, frozen)
        positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
        x = x + model.embed_tokens(tokens)
        hidden = model(x, positions, jnp.ones_like(positions), dropout_key=jax.random.wrap_key_data(key))
        return jnp.sum(model.token_nll(hidden, tokens))

    x = jax.ShapeDtypeStruct((batch, length, config.hidden_size), config.compute_dtype)
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(trained, x, frozen, tokens, key)
    return re.sub(r" at 0x[0-9a-f]+", "", str(jaxpr))


def array_sizes(jaxpr: str) -> set[int]:
    """The numbers of elements of all arrays of a computation and of those inside it."""
    return {int(np.prod([int(n) for n in shape.split(",")])) for shape in re.findall(r":\w+\[([\d,]+)\]", jaxpr)}


@pytest.mark.parametrize("tie_embeddings", [True, False], ids=["tied", "untied"])
def test_the_logits_of_a_row_never_exist_at_once(tie_embeddings):
    """Neither forward nor backward, and no array is as large but for chunks of the logits."""
    batch, length, chunk, vocab = 2, 24, 8, 500
    config = tiny_config(vocab_size=vocab, loss_chunk=chunk, tie_embeddings=tie_embeddings)
    found = array_sizes(trained_step(config, batch=batch, length=length))
    assert batch * chunk * vocab in found
    assert max(found - {vocab * config.hidden_size}) < batch * length * vocab
    whole = array_sizes(trained_step(dataclasses.replace(config, loss_chunk=length), batch=batch, length=length))
    assert batch * length * vocab in whole


# ---- sizes


@pytest.mark.parametrize("kernel_dtype", ["bfloat16", "int8", "nf4"])
def test_parameters_of_llama2_7b(kernel_dtype):
    """As many as published, and 33,554,432 of adapters; counting them allocates nothing."""
    before = sum(x.nbytes for x in jax.live_arrays())
    _, state = abstract(lambda: Llama(LlamaConfig(kernel_dtype=kernel_dtype), LoRAConfig(), rngs=nnx.Rngs(0)))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(state))
    assert sum(x.nbytes for x in jax.live_arrays()) - before < 2**20
    adapters, base = nnx.split_state(state, is_adapter, ...)
    count = lambda state: sum(int(np.prod(v.get_value().shape)) for _, v in nnx.to_flat_state(state))
    assert count(base) == 6_738_415_616
    assert count(adapters) == 33_554_432
    kernel = base["layers"]["mlp"]["down_proj"]["kernel"].get_value()
    assert kernel.shape == (32, 11008, 4096)
    if kernel_dtype == "bfloat16":
        assert kernel.dtype == jnp.bfloat16
    else:
        assert isinstance(kernel, qwix.QArray) and kernel.qtype == kernel_dtype
        assert kernel.scale.shape == {"int8": (32, 1, 4096), "nf4": (32, 172, 4096)}[kernel_dtype]


# ---- configuration

# Each field changed alone must change the shapes, the dtypes or the computation; `int8_products` needs int8 kernels.
LLAMA_CHANGES = {
    "vocab_size": 98,
    "hidden_size": 25,
    "intermediate_size": 45,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 3,
    "head_dim": 12,
    "rms_norm_eps": 2e-5,
    "rope_theta": 20000.0,
    "tie_embeddings": True,
    "kernel_dtype": "bfloat16",
    "param_dtype": "bfloat16",
    "compute_dtype": "bfloat16",
    "scan_layers": False,
    "remat": "full",
    "attention": "splash_interpret",
    "loss_chunk": 6,
}
LORA_CHANGES = {"rank": 5, "alpha": 5.0, "dropout": 0.1, "targets": ("q_proj", "o_proj")}


@pytest.fixture(scope="module")
def unchanged_step():
    return trained_step(tiny_config(), length=128)


def test_an_equal_configuration_gives_the_same_computation(unchanged_step):
    assert trained_step(tiny_config(), length=128) == unchanged_step
    assert {*LLAMA_CHANGES, "int8_products"} == {field.name for field in dataclasses.fields(LlamaConfig)}
    assert set(LORA_CHANGES) == {field.name for field in dataclasses.fields(LoRAConfig)}


@pytest.mark.parametrize("name", LLAMA_CHANGES)
def test_every_field_of_llama_config_has_an_effect(unchanged_step, name):
    assert getattr(tiny_config(), name) != LLAMA_CHANGES[name]
    assert trained_step(tiny_config(**{name: LLAMA_CHANGES[name]}), length=128) != unchanged_step


@pytest.mark.parametrize("name", LORA_CHANGES)
def test_every_field_of_lora_config_has_an_effect(unchanged_step, name):
    assert getattr(LORA, name) != LORA_CHANGES[name]
    lora = dataclasses.replace(LORA, **{name: LORA_CHANGES[name]})
    assert trained_step(tiny_config(), lora, length=128) != unchanged_step


def test_kernel_dtypes_give_different_computations():
    dtypes = ("float32", "bfloat16", "float16", "int8", "nf4")
    steps = {trained_step(tiny_config(kernel_dtype=dtype)) for dtype in dtypes}
    assert len(steps) == len(dtypes)


def test_products_of_integers_give_different_computations():
    products = ("none", "forward", "all")
    assert len({trained_step(tiny_config(kernel_dtype="int8", int8_products=name)) for name in products}) == 3


def test_remat_policies_give_different_computations():
    assert len({trained_step(tiny_config(remat=policy)) for policy in ("none", "full", "dots")}) == 3


def test_products_of_integers_are_kept_where_products_are():
    def products(remat):
        step = trained_step(tiny_config(kernel_dtype="int8", int8_products="forward", remat=remat))
        return step.count("preferred_element_type=int32")

    assert products("none") == products("dots") < products("full")


def test_splash_attention_is_not_recomputed_where_products_are_kept(capsys):
    """The logarithm of the softmax's sum, which its backward pass reads, exists in the kernel alone."""
    q, segment_ids = jnp.ones((1, 128, 2, 128)), jnp.ones((1, 128), jnp.int32)

    def is_kept(policy):
        attend = lambda q: jnp.sin(attention(2 * q, q, q, segment_ids, kernel="splash_interpret"))
        jax.ad_checkpoint.print_saved_residuals(jax.checkpoint(attend, policy=REMAT_POLICIES[policy]), q)
        return any(line.startswith("f32[1,2,128] ") for line in capsys.readouterr().out.splitlines())

    assert is_kept("dots") and not is_kept("full")


@pytest.mark.parametrize("target", PROJECTIONS)
def test_every_target_gets_an_adapter(target):
    _, state = abstract(lambda: Llama(tiny_config(), LoRAConfig(rank=4, targets=(target,)), rngs=nnx.Rngs(0)))
    found = [path for path, variable in nnx.to_flat_state(state) if is_adapter(path, variable)]
    assert {path[-2:] for path in found} == {(target, "lora_a"), (target, "lora_b")}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        *(({name: 0}, f"{name}=0: must be above 0") for name in LLAMA_CHANGES if "_size" in name or "num" in name),
        ({"head_dim": -2}, "head_dim=-2: must be above 0"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps=0.0: must be above 0"),
        ({"rope_theta": -1.0}, "rope_theta=-1.0: must be above 0"),
        ({"loss_chunk": 0}, "loss_chunk=0: must be above 0"),
        ({"num_kv_heads": 4}, "num_heads=6 must be a multiple of num_kv_heads=4"),
        ({"num_kv_heads": 12}, "num_heads=6 must be a multiple of num_kv_heads=12"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"int8_products": "all"}, "int8_products=all takes int8 kernels, not float32; set kernel_dtype=int8"),
        ({"kernel_dtype": "int4"}, "kernel_dtype='int4': choose one of float32, bfloat16, float16, int8, nf4"),
        ({"param_dtype": "int8"}, "param_dtype='int8': choose one of float32, bfloat16, float16"),
        ({"compute_dtype": "nf4"}, "compute_dtype='nf4': choose one of"),
        ({"remat": "some"}, "remat='some': choose one of none, full, dots"),
        (
            {"attention": "flash"},
            "attention='flash': choose one of auto, xla, cudnn, splash, splash_interpret, chunked",
        ),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_values_refused(changes, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        tiny_config(**changes)

"""Attention, by every kernel that runs here, against plain NumPy and against each other."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emollama_jax.config import DEFAULT_SHARDING
from emollama_jax.errors import UserError
from emollama_jax.models import attention as attention_module
from emollama_jax.models import chunked_attention
from emollama_jax.models.attention import (
    attention,
    bidirectional_attention,
    cached_attention,
    resolve_attention,
    resolve_for_devices,
    splash_padding,
)
from emollama_jax.models.llama import LlamaConfig
from emollama_jax.models.mae import MaeConfig
from emollama_jax.sharding import make_mesh, use_mesh
from tests.models.tiny import close


def inputs(batch: int, length: int, heads: int, kv_heads: int, head_dim: int = 16):
    """Queries, keys, values, and the cotangent of the output; segment ids of packed rows with padding inside."""
    random = np.random.default_rng(0)
    arrays = [random.normal(size=(batch, length, n, head_dim)) for n in (heads, kv_heads, kv_heads, heads)]
    cuts = np.sort(random.integers(1, length, (batch, 4)), axis=1)
    segment_ids = np.sum(np.arange(length)[:, None] >= cuts[:, None], axis=-1)
    segment_ids = np.array([5, 0, 2, 7, 0])[segment_ids]
    return *(jnp.asarray(x, jnp.float32) for x in arrays), jnp.asarray(segment_ids)


def naive(q, k, v, segment_ids) -> np.ndarray:
    """One query at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, length, heads, head_dim = q.shape
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(batch, length, heads):
        kv_head = n // (heads // k.shape[2])
        seen = [s for s in range(t + 1) if segment_ids[b, s] == segment_ids[b, t]]
        scores = k[b, seen, kv_head] @ q[b, t, n] / np.sqrt(head_dim)
        weights = np.exp(scores - np.max(scores))
        out[b, t, n] = weights @ v[b, seen, kv_head] / np.sum(weights)
    return out


def with_gradients(kernel: str, q, k, v, cotangent, segment_ids):
    """Output, and gradients of q, k and v."""

    @jax.jit
    def run(q, k, v, segment_ids):
        f = lambda q, k, v: attention(q, k, v, segment_ids, kernel=kernel)
        y, pull = jax.vjp(f, q, k, v)
        return y, *pull(cotangent)

    return run(q, k, v, segment_ids)


def same(found, expected) -> None:
    for what, a, b in zip(("output", "gradient of q", "gradient of k", "gradient of v"), found, expected, strict=True):
        close(a, b, 1e-5, what)


compiled = jax.jit(attention, static_argnames="kernel")


@pytest.mark.parametrize("kernel", ["xla", "chunked"])
@pytest.mark.parametrize("kv_heads", [6, 2, 1])
def test_attention_is_the_textbook_one(kernel, kv_heads):
    q, k, v, _, segment_ids = inputs(2, 17, 6, kv_heads, head_dim=10)
    close(compiled(q, k, v, segment_ids, kernel=kernel), naive(q, k, v, segment_ids), 1e-5, "output")


@pytest.mark.parametrize("kernel", ["xla", "chunked"])
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_new_tokens_against_a_cache_of_rows_of_their_own_lengths(kernel, kv_heads):
    """As the last tokens of each row among all of its own; what lies behind a row's length is not seen."""
    q, k, v, *_ = inputs(3, 17, 6, kv_heads)
    lengths, new = np.array([0, 5, 14]), 3
    seen, visible = jnp.repeat(lengths[:, None], new, axis=1), jnp.broadcast_to(jnp.tri(new, dtype=bool), (3, new, new))
    places = lengths[:, None] + np.arange(new)
    part = [jnp.take_along_axis(x, places[..., None, None], axis=1) for x in (q, k, v)]
    behind = (np.arange(17) >= lengths[:, None])[..., None, None]
    ours = cached_attention(*part, jnp.where(behind, 9, k), jnp.where(behind, 99, v), seen, visible, kernel=kernel)
    segment_ids = jnp.ones((3, 17), int)
    expected = naive(q, k, v, segment_ids)
    close(ours, np.take_along_axis(expected, places[..., None, None], axis=1), 1e-5, "output")


@pytest.mark.parametrize("kernel", ["xla", "chunked"])
def test_tokens_that_see_different_parts_of_one_cache(kernel, monkeypatch):
    """Three rows of 4 tokens on one row of 17: each token as the last one of a text of what it sees."""
    monkeypatch.setattr(chunked_attention, "SCORES", 2 * 4 * 21)  # two of six heads at a time
    (q, k, v, *_), (_, cached_k, cached_v, *_) = inputs(3, 4, 6, 2), inputs(1, 17, 6, 2)
    seen = np.array([[3, 3, 9, 17], [0, 0, 0, 0], [17, 16, 15, 1]])
    tree = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 1, 0, 1]], bool)
    visible = np.broadcast_to(tree, (3, 4, 4))
    ours = cached_attention(q, k, v, cached_k, cached_v, jnp.asarray(seen), jnp.asarray(visible), kernel=kernel)
    for row, token in np.ndindex(3, 4):
        text = lambda cached, new: np.concatenate([cached[0, : seen[row, token]], new[row][tree[token]]])[None]  # noqa: B023
        keys, values = text(cached_k, k), text(cached_v, v)
        queries = np.repeat(q[row, token][None, None], keys.shape[1], axis=1)
        expected = naive(queries, keys, values, np.ones(keys.shape[:2], int))[0, -1]
        close(ours[row, token], expected, 1e-5, f"token {token} of row {row}")


def test_half_precision_has_its_softmax_in_float32():
    """Scores of 64 more or less: rounded to bfloat16 they would be wrong by up to 1/8, and the weights with them."""
    q, k, v, _, segment_ids = inputs(2, 17, 4, 2)
    halves = [x.astype(jnp.bfloat16) for x in (q.at[..., 0].set(16), k.at[..., 0].add(16), v)]
    ours = compiled(*halves, segment_ids)
    assert ours.dtype == jnp.bfloat16
    expected = naive(*halves, segment_ids)
    error = np.linalg.norm(np.asarray(ours, np.float64) - expected) / np.linalg.norm(expected)
    print(f"relative error in bfloat16: {error:.1e}")
    assert error < 2**-8


@pytest.mark.parametrize(("length", "heads", "kv_heads"), [(256, 4, 4), (640, 4, 2), (200, 2, 1)])
def test_splash_is_attention(length, heads, kv_heads):
    """Rows of one block, of several, and of no whole block; grouped heads; several segments."""
    args = inputs(2, length, heads, kv_heads)
    same(with_gradients("splash_interpret", *args), with_gradients("xla", *args))


@pytest.mark.parametrize(("length", "heads", "kv_heads"), [(100, 4, 4), (600, 4, 2), (1300, 6, 3)])
def test_chunks_are_attention(length, heads, kv_heads):
    """Rows of one block of queries and of several, the last of them filled up; windows of several lengths."""
    args = inputs(2, length, heads, kv_heads)
    same(with_gradients("chunked", *args), with_gradients("xla", *args))


def test_chunks_of_short_segments_leave_the_keys_of_earlier_ones_alone():
    """What lies blocks before a segment is not even read: a number that would spoil every sum changes nothing."""
    q, k, v, cotangent, _ = inputs(1, 1024, 2, 1)
    segment_ids = jnp.arange(1024)[None] // 128
    expected = with_gradients("chunked", q, k, v, cotangent, segment_ids)
    spoiled = with_gradients("chunked", q, k, v.at[:, :128].set(jnp.nan), cotangent, segment_ids)
    assert np.isnan(spoiled[0][:, :128]).all()
    for a, b in zip(spoiled, expected, strict=True):
        np.testing.assert_array_equal(a[:, 128:], b[:, 128:])


def test_windows_of_keys_are_few_and_reach_to_the_whole_row():
    assert chunked_attention._windows(1) == [1]
    assert chunked_attention._windows(16) == [1, 2, 3, 4, 6, 8, 12, 16]


ROUNDING = {"bfloat16": 2**-6, "float16": 2**-9}  # of a gradient, relative: several times that of a number


@functools.partial(jax.jit, static_argnames=("attend", "kernel"))
def pulled(attend, kernel: str, q, k, v, cotangent, rows):
    """Output, and gradients of q, k and v."""
    y, pull = jax.vjp(lambda q, k, v: attend(q, k, v, rows, kernel=kernel), q, k, v)
    return y, *pull(cotangent)


def check_half_precision(attend, kernel: str, dtype: str, q, k, v, cotangent, rows, common: float = 3) -> None:
    """Output and gradients are those of XLA in float32 on the same numbers, up to rounding.

    Keys and values have much in common, as behind biases: what tells them apart is a small difference of large numbers.
    """
    halves = [x.astype(dtype) for x in (q, k + common, v + common, cotangent)]
    found = pulled(attend, kernel, *halves, rows)
    expected = pulled(attend, "xla", *(x.astype(jnp.float32) for x in halves), rows)
    for what, a, b in zip(("output", "gradient of q", "gradient of k", "gradient of v"), found, expected, strict=True):
        assert a.dtype == dtype, what
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        assert np.linalg.norm(a - b) <= ROUNDING[dtype] * np.linalg.norm(b), what


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("kernel", ["xla", "chunked"])
def test_gradients_of_packed_rows_in_half_precision(kernel, dtype):
    """Rows of several segments and padding, three blocks of queries long."""
    check_half_precision(attention, kernel, dtype, *inputs(2, 384, 2, 1))


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("length", "kv_heads"), [(128, 2), (640, 1)])
def test_gradients_of_splash_attention_in_half_precision(length, kv_heads, dtype):
    """Rows of one block and of several, with grouped heads.

    Values have nothing in common: flash attention takes what is common out of the gradients by the output, which is
    rounded before.
    """
    check_half_precision(attention, "splash_interpret", dtype, *inputs(2, length, 2, kv_heads), common=0)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("kernel", ["xla", "chunked"])
def test_gradients_of_padded_rows_in_half_precision(kernel, dtype):
    """Of the encoders; the output beyond a row's length means nothing, and no gradient comes from there."""
    lengths = jnp.array([50, 1, 31])
    q, k, v, cotangent, _ = inputs(3, 50, 2, 2)
    cotangent = jnp.where(jnp.arange(50)[:, None, None] < lengths[:, None, None, None], cotangent, 0)
    check_half_precision(bidirectional_attention, kernel, dtype, q, k, v, cotangent, lengths)


CASES = [  # platform, devices, head size, dtype, compute capability; the kernel of the decoder, of an encoder
    (("cpu", 1, 128, "bfloat16", 0.0), "chunked", "chunked"),
    (("cpu", 1, 128, "float32", 0.0), "chunked", "chunked"),
    (("cpu", 8, 128, "bfloat16", 0.0), "xla", "chunked"),
    (("tpu", 1, 128, "bfloat16", 0.0), "splash", "splash"),
    (("tpu", 16, 64, "float32", 0.0), "splash", "splash"),
    (("gpu", 1, 128, "bfloat16", 9.0), "cudnn", "cudnn"),
    (("cuda", 8, 64, "float16", 8.0), "cudnn", "cudnn"),
    (("gpu", 1, 128, "float32", 9.0), "xla", "xla"),
    (("gpu", 1, 128, "float16", 7.5), "xla", "xla"),
    (("gpu", 1, 256, "bfloat16", 9.0), "xla", "xla"),
    (("gpu", 1, 90, "bfloat16", 9.0), "xla", "xla"),
]


@pytest.mark.parametrize(("devices", "decoder", "encoder"), CASES, ids=lambda case: str(case))
def test_kernel_of_auto(devices, decoder, encoder):
    names = ("platform", "num_devices", "head_dim", "dtype", "compute_capability")
    facts = dict(zip(names, devices, strict=True))
    assert resolve_attention("auto", causal=True, **facts) == decoder
    assert resolve_attention("auto", causal=False, **facts) == encoder
    for kernel in ("xla", "cudnn", "chunked"):  # a name stands for itself on every device
        assert {resolve_attention(kernel, causal=causal, **facts) for causal in (True, False)} == {kernel}
    splash = {resolve_attention("splash", causal=causal, **facts) for causal in (True, False)}
    assert splash == {"splash" if facts["platform"] == "tpu" else "splash_interpret"}


def test_devices_are_asked_for_their_platform_and_number():
    facts = {"causal": True, "head_dim": 64, "dtype": "bfloat16"}
    assert resolve_for_devices("auto", jax.devices()[:1], **facts) == "chunked"
    assert resolve_for_devices("auto", make_mesh({"data": 8}).devices.flat, **facts) == "xla"
    gpu = types.SimpleNamespace(platform="gpu", compute_capability="9.0")
    assert resolve_for_devices("auto", [gpu], **facts) == "cudnn"


def test_the_config_of_a_model_names_the_kernel_of_its_devices():
    assert LlamaConfig().for_devices(jax.devices()[:1]).attention == "chunked"
    assert LlamaConfig().for_devices(jax.devices()).attention == "xla"
    assert LlamaConfig(attention="cudnn").for_devices(jax.devices()).attention == "cudnn"
    assert MaeConfig().for_devices(jax.devices()) == MaeConfig(attention="chunked")


def test_processors_do_not_compute_in_float16():
    """What XLA says of it, it says in the middle of a step."""
    for config in (LlamaConfig(compute_dtype="float16"), MaeConfig(compute_dtype="float16", attention="xla")):
        with pytest.raises(UserError, match="compute_dtype=float16: .*set bfloat16 or float32"):
            config.for_devices(jax.devices()[:1])


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["splash", "splash_interpret", "chunked", "cudnn"])
def test_single_tokens_go_through_xla(kernel, monkeypatch):
    """No kernel here is one that runs on CPUs only by luck."""
    for name in ("masked_attention", "packed_attention", "_splash"):
        monkeypatch.setattr(attention_module, name, None)
    q, k, v, _, segment_ids = inputs(2, 16, 4, 2)
    alone = [x[:, :1] for x in (q, k, v, segment_ids)]
    close(attention(*alone, kernel=kernel), attention(*alone), 0, "one token")
    close(bidirectional_attention(*alone[:1] * 3, kernel=kernel), alone[0], 1e-6, "one token of itself")


@pytest.mark.smoke
def test_splash_on_a_mesh():
    """Rows over data and fsdp, heads over tensor."""
    args = inputs(4, 128, 4, 2)
    expected = with_gradients("xla", *args)
    with use_mesh(make_mesh({"data": 2, "fsdp": 2, "tensor": 2}), DEFAULT_SHARDING):
        found = with_gradients("splash_interpret", *args)
        same(with_gradients("xla", *args), expected)
    same(found, expected)
    assert found[0].addressable_shards[0].data.shape == (1, 128, 2, 16)


def test_padding_to_whole_blocks():
    """The fewest tokens, in the longest blocks that take no more."""
    assert {length: splash_padding(length) for length in (1025, 1568, 197, 128, 2048)} == {
        1025: 127,
        1568: 96,
        197: 59,
        128: 0,
        2048: 0,
    }


def test_splash_refuses_heads_that_do_not_split_alike():
    q, k, v, _, segment_ids = inputs(2, 128, 4, 2)
    with use_mesh(make_mesh({"data": 1, "fsdp": 2, "tensor": 4}), DEFAULT_SHARDING):
        with pytest.raises(ValueError, match="cannot split 4 heads and 2 key/value heads alike"):
            jax.eval_shape(lambda: attention(q, k, v, segment_ids, kernel="splash"))


@pytest.mark.parametrize("kernel", ["xla", "chunked", "splash_interpret"])
@pytest.mark.parametrize("lengths", [None, (11, 1, 7)])
def test_bidirectional_attention_is_the_textbook_one(kernel, lengths, monkeypatch):
    """Also where only some of the heads are worked on at once, and where these do not divide the heads."""
    monkeypatch.setattr(chunked_attention, "SCORES", 2 * 11 * 11)
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.normal(size=(3, 11, 3, 8)), jnp.float32) for _ in range(3))
    given = None if lengths is None else jnp.asarray(lengths)
    found = jax.jit(bidirectional_attention, static_argnames="kernel")(q, k, v, given, kernel=kernel)
    for b, length in enumerate(lengths or (11,) * 3):
        scores = np.einsum("tnh,snh->nts", q[b], k[b, :length], dtype=np.float64) / np.sqrt(8)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        expected = np.einsum("nts,snh->tnh", weights / weights.sum(-1, keepdims=True), v[b, :length])
        close(found[b, :length], expected[:length], 1e-6, f"row {b}")
        assert np.all(np.isfinite(found[b]))


def test_gradients_of_bidirectional_splash_attention():
    """Rows of several blocks, heads that fill no tile."""
    q, k, v, cotangent, _ = inputs(2, 300, 3, 3, head_dim=24)
    lengths = jnp.asarray([300, 170])
    cotangent = jnp.where(jnp.arange(300)[:, None, None] < lengths[:, None, None, None], cotangent, 0)

    def run(kernel):
        y, pull = jax.vjp(lambda *qkv: bidirectional_attention(*qkv, lengths, kernel=kernel), q, k, v)
        return jnp.where(cotangent == 0, 0, y), *pull(cotangent)

    same(jax.jit(run, static_argnums=0)("splash_interpret"), jax.jit(run, static_argnums=0)("xla"))


def test_chunks_of_half_precision_have_their_softmax_in_float32():
    """1,024 equal weights, whose sum bfloat16 would round."""
    q = jnp.zeros((1, 1024, 1, 8), jnp.bfloat16)
    v = jnp.ones_like(q)
    found = bidirectional_attention(q, q, v, kernel="chunked")
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, v)


def test_unknown_bidirectional_kernel():
    q = jnp.zeros((1, 2, 1, 8))
    with pytest.raises(ValueError, match="attention 'flash' is unknown; choose one of auto, xla, cudnn, splash"):
        bidirectional_attention(q, q, q, kernel="flash")


def test_unknown_kernel():
    q, k, v, _, segment_ids = inputs(1, 4, 2, 2)
    with pytest.raises(
        ValueError, match="attention 'flash' is unknown; choose one of auto, xla, cudnn, splash, splash_interpret"
    ):
        attention(q, k, v, segment_ids, kernel="flash")

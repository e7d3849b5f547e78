"""The decoder against torch's LlamaForCausalLM with the same random parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emollama_jax.models.layers import cos_and_sin, rotary_angles
from emollama_jax.models.llama import Llama
from emollama_jax.sharding import abstract

torch = pytest.importorskip("torch")

from tests.models.tiny import close, rows, tiny_config  # noqa: E402
from tests.parity.torch_llama import as_torch, from_torch, torch_llama  # noqa: E402

PER_LAYER, WHOLE_MODEL = 1e-5, 1e-4
LENGTHS = (13, 8)  # of two rows, padded at the right
VARIANTS = {
    "mha": tiny_config(num_layers=3, num_kv_heads=6),
    "gqa-long-base": tiny_config(num_layers=3, rope_theta=1e5),
    "mqa-tied": tiny_config(num_kv_heads=1, tie_embeddings=True, rms_norm_eps=1e-3),
}


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request):
    """(configuration, torch's model, ours, ours compiled)."""
    config = VARIANTS[request.param]
    theirs = torch_llama(config)
    ours = from_torch(theirs, config)
    graphdef, params = nnx.split(ours)

    def loss(params, x, positions, segment_ids, targets):
        model = nnx.merge(graphdef, params)
        hidden = model(x, positions, segment_ids)
        nll = model.token_nll(hidden, targets)
        return nll.sum(), (hidden, model.logits(hidden), nll)

    def run(x, positions, segment_ids, targets):
        """((gradients of parameters and x), (hidden states, logits, token losses))."""
        return gradient(params, jnp.asarray(x), positions, segment_ids, targets)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    return config, theirs, ours, run


def forward_torch(model, tokens, mask=None):
    """(what each part puts out: embeddings, every block, final norm; logits)."""
    outputs = []
    parts = [model.model.embed_tokens, *model.model.layers, model.model.norm]
    keep = lambda module, inputs, output: outputs.append(output[0] if isinstance(output, tuple) else output)
    hooks = [part.register_forward_hook(keep) for part in parts]
    with torch.no_grad():
        mask = None if mask is None else as_torch(mask)
        logits = model(input_ids=as_torch(tokens), attention_mask=mask).logits
    for hook in hooks:
        hook.remove()
    return [output.numpy() for output in outputs], logits.numpy()


def test_every_layer(pair):
    config, theirs, ours, _ = pair
    tokens, positions, segment_ids = rows(config)
    (embedded, *blocks, normed), logits = forward_torch(theirs, tokens)
    np.testing.assert_array_equal(ours.embed_tokens(tokens), embedded)
    graphdef, stacked = nnx.split(ours.layers)
    cos_sin = cos_and_sin(rotary_angles(positions, config.head_dim, config.rope_theta))

    @jax.jit
    def run_block(params, x):
        return nnx.merge(graphdef, params)(x, cos_sin, segment_ids, None)[0]

    for i, (before, after) in enumerate(zip([embedded, *blocks], blocks, strict=False)):
        block = run_block(jax.tree.map(lambda a: a[i], stacked), before)  # noqa: B023
        close(block, after, PER_LAYER, f"block {i}")
    close(ours.final_norm(jnp.asarray(blocks[-1])), normed, PER_LAYER, "final norm")
    close(ours.logits(jnp.asarray(normed)), logits, PER_LAYER, "head")


def test_whole_model(pair):
    config, theirs, ours, run = pair
    tokens, positions, segment_ids = rows(config)
    outputs, logits = forward_torch(theirs, tokens)
    _, (hidden, our_logits, _) = run(ours.embed_tokens(tokens), positions, segment_ids, tokens)
    close(hidden, outputs[-1], WHOLE_MODEL, "hidden states")
    close(our_logits, logits, WHOLE_MODEL, "logits")


def test_right_padding(pair):
    """torch's attention mask and our segment 0."""
    config, theirs, ours, run = pair
    tokens, positions, segment_ids = rows(config, LENGTHS)
    _, logits = forward_torch(theirs, tokens, mask=segment_ids)
    _, (_, our_logits, _) = run(ours.embed_tokens(tokens), positions, segment_ids, tokens)
    assert np.all(np.isfinite(our_logits))
    close(our_logits * segment_ids[..., None], logits * np.asarray(segment_ids)[..., None], WHOLE_MODEL, "logits")


def test_loss_and_its_gradient(pair):
    """Cross entropy and its gradients: of the input embeddings, of the last of a block's kernels, and of the head."""
    config, theirs, _, run = pair
    tokens, positions, segment_ids = rows(config, seed=2)
    targets = jnp.roll(tokens, -1, axis=1)
    theirs.zero_grad()
    x = theirs.model.embed_tokens(as_torch(tokens)).detach().requires_grad_()
    logits = theirs(inputs_embeds=x).logits
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), as_torch(targets).flatten().long(), reduction="none")
    nll.sum().backward()

    (gradient, x_gradient), (_, _, our_nll) = run(x.detach().numpy(), positions, segment_ids, targets)
    close(our_nll, nll.detach().reshape(targets.shape), WHOLE_MODEL, "token losses")
    close(x_gradient, x.grad, WHOLE_MODEL, "gradient of the embeddings")
    down_proj = np.stack([layer.mlp.down_proj.weight.grad.T for layer in theirs.model.layers])
    close(gradient.layers.mlp.down_proj.kernel[...], down_proj, WHOLE_MODEL, "gradient of down_proj")
    head = gradient.embed.embedding[...] if config.tie_embeddings else gradient.lm_head.kernel[...].T
    close(head, theirs.lm_head.weight.grad, WHOLE_MODEL, "gradient of the head")


@pytest.fixture(scope="module")
def gqa():
    """(configuration, input embeddings, torch's logits and gradient of the sum of their squares, our parameters)."""
    config = tiny_config()
    theirs = torch_llama(config)
    tokens, _, segment_ids = rows(config, LENGTHS)
    x = theirs.model.embed_tokens(as_torch(tokens)).detach().requires_grad_()
    logits = theirs(inputs_embeds=x, attention_mask=as_torch(segment_ids)).logits * as_torch(segment_ids)[..., None]
    logits.square().sum().backward()
    return config, jnp.asarray(x.detach().numpy()), logits.detach(), x.grad, nnx.state(from_torch(theirs, config))


@pytest.mark.parametrize(
    ("scan_layers", "remat"), [(True, "none"), (True, "full"), (True, "dots"), (False, "none"), (False, "full")]
)
def test_every_way_to_run_the_layers(gqa, scan_layers, remat):
    """torch's logits and gradients, whether layers are scanned or not and whatever is recomputed."""
    config, x, logits, x_gradient, params = gqa
    config = dataclasses.replace(config, scan_layers=scan_layers, remat=remat)
    graphdef, _ = abstract(lambda: Llama(config, rngs=nnx.Rngs(0)))
    _, positions, segment_ids = rows(config, LENGTHS)

    def loss(x):
        model: Llama = nnx.merge(graphdef, params)
        logits = model.logits(model(x, positions, segment_ids)) * segment_ids[..., None]
        return jnp.sum(jnp.square(logits)), logits

    our_gradient, our_logits = jax.jit(jax.grad(loss, has_aux=True))(x)
    close(our_logits, logits, WHOLE_MODEL, "logits")
    scale = float(x_gradient.abs().max())
    close(our_gradient / scale, x_gradient / scale, WHOLE_MODEL, "gradient of the embeddings, relative")


def test_rotary_frequencies_up_to_the_longest_prompt():
    """The angles of position 4095 rest on the last bit of the frequencies: ours are torch's up to that bit."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = tiny_config(head_dim=128)
    theirs = torch_llama(dataclasses.replace(config, num_layers=1)).config
    inv_freq = LlamaRotaryEmbedding(theirs).inv_freq.numpy()
    ours = rotary_angles(jnp.array([[1]]), config.head_dim, config.rope_theta)[0, 0, 0]
    np.testing.assert_array_max_ulp(np.asarray(ours), inv_freq, maxulp=1)

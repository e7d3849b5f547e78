"""Adapters against PEFT's on torch's LlamaForCausalLM."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emollama_jax.models.lora import PROJECTIONS, LoRAConfig, is_adapter, merge
from emollama_jax.weights.llama import hugging_face_table
from emollama_jax.weights.peft import adapter_table
from tests.models.tiny import close, llama_of, rows, tiny_config

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from tests.parity.torch_llama import as_torch, tensors_of, torch_llama  # noqa: E402

TARGETS = {"q and v": ("q_proj", "v_proj"), "all": PROJECTIONS}


@pytest.fixture(scope="module", params=TARGETS)
def pair(request):
    """(configuration, PEFT's model with adapters that are not zero, ours)."""
    config = tiny_config()
    lora = LoRAConfig(rank=5, alpha=12.0, dropout=0.0, targets=TARGETS[request.param])
    theirs = torch_llama(config)
    tensors = tensors_of(theirs)
    settings = peft.LoraConfig(r=5, lora_alpha=12, lora_dropout=0.0, target_modules=list(lora.targets))
    theirs = peft.get_peft_model(theirs, settings)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    tables = hugging_face_table(config), adapter_table(lora.targets, adapter="default")
    ours = llama_of(tensors | tensors_of(theirs), config, lora, *tables)
    return config, theirs, ours


@nnx.jit
def logits_of(model, tokens, positions, segment_ids):
    return model.logits(model(model.embed_tokens(tokens), positions, segment_ids))


def test_logits_and_gradients(pair):
    config, theirs, ours = pair
    tokens, positions, segment_ids = rows(config)
    targets = jnp.roll(tokens, -1, axis=1)
    theirs.zero_grad()
    logits = theirs(input_ids=as_torch(tokens)).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), as_torch(targets).flatten().long()).backward()

    graphdef, trained, frozen = nnx.split(ours, is_adapter, ...)

    @jax.jit
    def gradient(trained):
        def loss(trained):
            model = nnx.merge(graphdef, trained, frozen)
            hidden = model(model.embed_tokens(tokens), positions, segment_ids)
            return model.token_nll(hidden, targets).mean(), model.logits(hidden)

        return jax.grad(loss, has_aux=True)(trained)

    our_gradients, our_logits = gradient(trained)
    close(our_logits, logits.detach(), 1e-4, "logits")

    found, worst = set(), 0.0
    for (*_, layer_name, leaf), gradients in nnx.to_flat_state(our_gradients):
        for layer, ours_here in enumerate(np.asarray(gradients[...])):
            pattern = rf".*\.layers\.{layer}\..*\.{layer_name}\.lora_{leaf[-1].upper()}\.default\.weight"
            ((name, parameter),) = [(n, p) for n, p in theirs.named_parameters() if re.fullmatch(pattern, n)]
            expected = parameter.grad.numpy().T
            error = np.linalg.norm(ours_here - expected) / np.linalg.norm(expected)
            worst = max(worst, error)
            assert error <= 1e-4, name
            found.add(name)
    print(f"{len(found)} gradients: worst relative error {worst:.2e}")
    assert found == {name for name, parameter in theirs.named_parameters() if parameter.requires_grad}


def test_merge(pair):
    """PEFT's merged model has the same logits and kernels."""
    config, theirs, ours = pair
    args = rows(config)
    apart = logits_of(ours, *args)
    theirs.merge_adapter()
    merge(ours)
    with torch.no_grad():
        close(logits_of(ours, *args), theirs(input_ids=as_torch(args[0])).logits, 1e-4, "merged logits")
    close(logits_of(ours, *args), apart, 1e-4, "merged and apart")
    merged_q = [layer.self_attn.q_proj.weight.detach().numpy().T for layer in theirs.model.model.layers]
    close(ours.layers.attn.q_proj.kernel[...], np.stack(merged_q), 1e-6, "merged q_proj")

    merge(ours)  # a second time changes nothing
    close(ours.layers.attn.q_proj.kernel[...], np.stack(merged_q), 1e-6, "merged q_proj")

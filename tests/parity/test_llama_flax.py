"""The decoder against transformers' FlaxLlamaForCausalLM with the same random parameters."""

import jax
import numpy as np
import pytest
import transformers
from flax import nnx, traverse_util

from emollama_jax.weights.llama import flax_table, hugging_face_config

if int(transformers.__version__.split(".")[0]) >= 5:
    pytest.skip(f"transformers {transformers.__version__} has no Flax models", allow_module_level=True)

from tests.models.tiny import NO_ADAPTERS, close, llama_of, rows, tiny_config  # noqa: E402


@pytest.mark.parametrize("num_kv_heads", [6, 2], ids=["mha", "gqa"])
def test_whole_model(num_kv_heads):
    config = tiny_config(head_dim=4, num_kv_heads=num_kv_heads)  # the Flax class knows only hidden_size / num_heads
    settings = transformers.LlamaConfig(**hugging_face_config(config, "float32"))
    theirs = transformers.FlaxLlamaForCausalLM(settings, input_shape=(1, 4), _do_init=False)
    random = np.random.default_rng(0)

    def fill(path: tuple[str, ...], value: jax.ShapeDtypeStruct) -> np.ndarray:
        noise = random.normal(size=value.shape).astype(np.float32)
        if path[-1] == "weight":
            return 1 + 0.3 * noise
        return noise if path[-1] == "embedding" else noise * value.shape[0] ** -0.5

    params = {path: fill(path, value) for path, value in traverse_util.flatten_dict(theirs.params_shape_tree).items()}
    tensors = {"/".join(path): value for path, value in params.items()}
    ours = llama_of(tensors, config, NO_ADAPTERS, flax_table(config))
    tokens, positions, segment_ids = rows(config)
    logits = jax.jit(lambda params: theirs(tokens, params=params).logits)(traverse_util.unflatten_dict(params))
    hidden = nnx.jit(lambda model: model(model.embed_tokens(tokens), positions, segment_ids))(ours)
    close(ours.logits(hidden), logits, 1e-4, "logits")
    assert np.std(logits) > 0.5

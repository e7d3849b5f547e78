"""The 7B model with random weights, for the test of its memory.

python -m tests.colab.seven_b write FOLDER          # a Hugging Face folder of 13.5 GB
python -m tests.colab.seven_b answer BASE           # loads a base checkpoint and answers about a clip of noise
"""

import dataclasses
import json
import shutil
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from sentencepiece import SentencePieceProcessor as Tokenizer

from emollama_jax.models.llama import LlamaConfig

TOKENIZER = Path(__file__).parents[1] / "data/reference_tiny/llama/tokenizer.model"
LAYERS, WIDTH, MLP, VOCAB = 32, 4096, 11008, 32000


def write(folder: Path) -> None:
    """Write LLaMA-2-7B's tensors, one file a layer, with values of their usual size."""
    folder.mkdir(parents=True)
    values = (np.random.default_rng(0).normal(size=1 << 24) * 0.02).astype(ml_dtypes.bfloat16)
    noise = lambda *shape: np.resize(values, shape)
    square = {f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"}
    kernels = square | {"mlp.gate_proj": (MLP, WIDTH), "mlp.up_proj": (MLP, WIDTH), "mlp.down_proj": (WIDTH, MLP)}
    ones = np.ones(WIDTH, ml_dtypes.bfloat16)
    norms = ("input_layernorm", "post_attention_layernorm")
    where = {}

    def save(name: str, tensors: dict[str, np.ndarray]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, name))

    for layer in range(LAYERS):
        start = f"model.layers.{layer}"
        tensors = {f"{start}.{name}.weight": noise(*shape) for name, shape in kernels.items()}
        save(f"model-{layer:02}.safetensors", tensors | {f"{start}.{name}.weight": ones for name in norms})
    ends = {name: noise(VOCAB, WIDTH) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    ends["lm_head.weight"][Tokenizer(model_file=str(TOKENIZER)).vocab_size() :] = 0  # never the likeliest of all
    save(f"model-{LAYERS}.safetensors", ends | {"model.norm.weight": ones})
    size = sum((folder / name).stat().st_size for name in set(where.values()))
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    settings = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
    sizes = {"hidden_size": WIDTH, "intermediate_size": MLP, "num_hidden_layers": LAYERS, "vocab_size": VOCAB}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16", "max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(settings | sizes | heads | ids))
    shutil.copy(TOKENIZER, folder)


def answer(base: Path) -> None:
    """Load a base checkpoint as the model of `colab_t4`, on the processor, and answer about a clip."""
    from emollama_jax import Engine
    from emollama_jax.config import GenerateConfig, load_config
    from emollama_jax.infer.clip_input import ClipInput

    config = load_config("colab_t4")
    llama = dataclasses.replace(config.llama, compute_dtype="float32")
    assert isinstance(llama, LlamaConfig)
    weights = dataclasses.replace(config.weights, trained="")
    config = dataclasses.replace(config, llama=llama, weights=weights, generate=GenerateConfig(max_new_tokens=4))
    start = time.monotonic()
    engine = Engine.load(config=config, base=base, inputs="image_tokens", slots=1)
    loaded = time.monotonic()
    print(f"loaded in {loaded - start:.0f} s", flush=True)
    rng = np.random.default_rng(1)
    clip = ClipInput(
        name="noise",
        subtitle="I never thought that you would come.",
        features=rng.normal(size=(3, 1024)).astype(np.float32),
        has_feature=np.ones(3, bool),
        image_tokens=rng.normal(size=(1025, 1408)).astype(np.float16),
    )
    found = engine.ask(clip, "[reason] Why?")
    print(f"answered in {time.monotonic() - loaded:.0f} s: {found.answer!r}")


if __name__ == "__main__":
    {"write": write, "answer": answer}[sys.argv[1]](Path(sys.argv[2]))

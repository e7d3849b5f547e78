"""Settings of models that nobody knows are refused, those that are known not to matter are not; and values that are no
weights, or that what is written cannot hold."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from emollama_jax import cli
from emollama_jax.models.llama import LlamaConfig
from emollama_jax.weights.base_checkpoint import save_base
from emollama_jax.weights.eva_vit import load_eva_vit
from emollama_jax.weights.hubert import load_hubert
from emollama_jax.weights.llama import architecture
from emollama_jax.weights.mae import load_mae
from emollama_jax.weights.pretrained import load_llama
from emollama_jax.weights.safetensors_files import save_safetensors
from emollama_jax.weights.sources import open_source
from emollama_jax.weights.torch_files import save_torch
from emollama_jax.weights.videomae import load_videomae
from tests.weights.tiny import (
    FLOAT32,
    CountingSource,
    random_weights,
    settings_of,
    tiny_config,
    user_error,
    write_folder,
    write_gguf,
)

CONFIG = tiny_config(num_layers=1)
ENCODERS = {
    "ViTMAEConfig": load_mae,
    "ViTConfig": load_mae,
    "VideoMAEConfig": load_videomae,
    "HubertConfig": load_hubert,
}


def read(**settings):
    return architecture(CountingSource({}, settings_of(CONFIG) | settings))


# --- config.json ---


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_scaling": {"type": "linear", "factor": 1.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 1}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 1.0}},
        {"hidden_act": "swish", "rope_interleaved": False, "partial_rotary_factor": 1.0},
        {"max_position_embeddings": 4096, "pretraining_tp": 2, "attention_dropout": 0.1, "_name_or_path": "x"},
        {"eos_token_id": [2, 5], "torch_dtype": "float16", "use_cache": False, "architectures": ["LlamaForCausalLM"]},
        {"a_setting_of_tomorrow": None, "another": {}, "is_encoder_decoder": False},
    ],
    ids=lambda settings: ",".join(settings),
)
def test_settings_that_change_nothing(settings):
    assert LlamaConfig(**read(**settings), **FLOAT32, remat="none") == CONFIG


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"residual_multiplier": 0.2}, ["unknown settings", "residual_multiplier='0.2'", "remove those"]),
        ({"use_rope": False}, ["use_rope='False'"]),
        ({"sliding_window": 4096}, ["sliding_window='4096'"]),
        ({"auto_map": {"AutoModel": "x.Y"}}, ["auto_map="]),
        ({"is_encoder_decoder": True}, ["is_encoder_decoder='True'"]),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["quantised (gptq)", "float version"]),
        ({"quantization_config": {"load_in_8bit": True}}, ["quantised (quantization_config)", "float version"]),
        ({"partial_rotary_factor": 0.5}, ["rotary positions on a part of each head"]),
        ({"rope_interleaved": True}, ["interleaved"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 1.0}}, ["scaled rotary positions"]),
        ({"rope_scaling": {"type": "linear", "factor": 1.5}}, ["scaled rotary positions"]),
        ({"rope_scaling": {"type": "default", "low_freq_factor": 1.0}}, ["scaled rotary positions"]),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ["scaled rotary positions"]),
    ],
)
def test_settings_that_may_change_numbers(settings, words):
    with user_error("memory.safetensors", *words):
        read(**settings)


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["LlamaConfig", *ENCODERS])
def test_all_that_transformers_writes_by_default_is_known(kind):
    config = getattr(pytest.importorskip("transformers"), kind)().to_dict()
    if kind == "LlamaConfig":
        assert architecture(CountingSource({}, config))["hidden_size"] == 4096
    else:
        with user_error("missing: "):  # the settings are all right, the tensors are not there
            ENCODERS[kind](CountingSource({}, config))


@pytest.mark.parametrize("kind", ENCODERS)
def test_unknown_settings_of_encoders(kind):
    config = getattr(pytest.importorskip("transformers"), kind)().to_dict()
    with user_error("unknown settings", "layer_scale='0.1'"):
        ENCODERS[kind](CountingSource({}, config | {"layer_scale": 0.1}))


@pytest.mark.parametrize(
    "name, value", [("hidden_act", "quick_gelu"), ("num_attention_heads", 12), ("qkv_bias", False)]
)
@pytest.mark.parametrize("whole", [True, False])
def test_vision_models_that_compute_something_else(name, value, whole):
    """What the tensors of a BLIP-2 do not show, its settings do."""
    settings = {"vision_config": {name: value}} if whole else {name: value}
    with user_error(f"the vision model has {name}={value!r}, not", "memory.safetensors"):
        load_eva_vit(CountingSource({}, settings))


# --- GGUF headers ---


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0}, []),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, []),
        ({"llama.rope.dimension_count": 24, "llama.attention.value_length": 24, "llama.expert_count": 0}, []),
        ({"llama.context_length": 4096, "llama.vocab_size": 640, "quantize.imatrix.file": "x"}, []),
        ({"llama.rope.scaling.factor": 4.0}, ["scaled rotary positions"]),
        ({"llama.rope.scale_linear": 4.0}, ["scaled rotary positions"]),
        ({"llama.rope.scaling.type": "yarn"}, ["scaled rotary positions"]),
        ({"llama.rope.scaling.attn_factor": 1.1}, ["attention factor"]),
        ({"llama.rope.dimension_count": 12}, ["rotary positions on a part of each head"]),
        ({"llama.attention.value_length": 12}, ["values of another width"]),
        ({"llama.expert_count": 8}, ["experts"]),
        ({"llama.attention.causal": False}, ["attention to later tokens"]),
        ({"llama.logit_scale": 0.5}, ["unknown settings", "llama.logit_scale='0.5'"]),
    ],
    ids=str,
)
def test_keys_of_a_gguf_header(gguf_source, changes, words):
    gguf_source.config = gguf_source.config | changes
    if not words:
        assert LlamaConfig(**architecture(gguf_source), **FLOAT32, remat="none") == CONFIG
        return
    with user_error("tiny.gguf", *words):
        architecture(gguf_source)


@pytest.fixture
def gguf_source(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", CONFIG, random_weights(CONFIG))
    with open_source(tmp_path / "tiny.gguf") as source:
        yield source


# --- values ---


@pytest.mark.parametrize("dtype", ["int8", "int32", "uint8", "bool"])
def test_integers_are_no_weights(tmp_path, dtype):
    weights = random_weights(CONFIG)
    name = "model.layers.0.mlp.down_proj.weight"
    write_folder(tmp_path, CONFIG, weights | {name: np.ones((64, 128), dtype)})
    with user_error(f"tensor {name} holds {dtype} numbers, not floats", "quantised", str(tmp_path)):
        load_llama(tmp_path, **FLOAT32)


def large(tmp_path, value=1e5):
    weights = {name: value.astype(ml_dtypes.bfloat16) for name, value in random_weights(CONFIG).items()}
    weights["model.layers.0.mlp.down_proj.weight"][3, 4] = value
    return write_folder(tmp_path / "in", CONFIG, weights)


@pytest.mark.parametrize("arguments", [["--to", "hf"], [], ["--kernel-dtype", "float32"]])
def test_what_float16_cannot_hold_is_not_written(capsys, tmp_path, arguments):
    source = large(tmp_path)
    if arguments == ["--kernel-dtype", "float32"]:  # there the norms and the embedding are float16, and fit
        assert cli.main(["convert", str(source), str(tmp_path / "out"), "--dtype", "float16", *arguments]) == 0
        return
    assert cli.main(["convert", str(source), str(tmp_path / "out"), "--dtype", "float16", *arguments]) == 2
    error = capsys.readouterr().err
    assert "down_proj.weight has values up to 9.98e+04, which float16 cannot hold" in error and "bfloat16" in error
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_largest_float16_is_written(tmp_path):
    source = large(tmp_path, 65504 - 992)  # a bfloat16 below float16's largest
    assert cli.main(["convert", str(source), str(tmp_path / "out"), "--to", "hf", "--dtype", "float16"]) == 0
    out = load_file(tmp_path / "out/model.safetensors")
    assert np.max(out["model.layers.0.mlp.down_proj.weight"]) == np.float16(ml_dtypes.bfloat16(65504 - 992))


def test_a_sum_that_float16_cannot_hold(capsys, tmp_path):
    """Kernel and adapter fit, what they add up to does not: with either output."""
    source = large(tmp_path, 64000)
    a, b = np.zeros((1, 128), np.float32), np.zeros((64, 1), np.float32)
    a[0, 4], b[3, 0] = 1.0, 3000.0
    prefix = "base_model.model.model.layers.0.mlp.down_proj.lora"
    (tmp_path / "adapter").mkdir()
    save_file({f"{prefix}_A.weight": a, f"{prefix}_B.weight": b}, tmp_path / "adapter/adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["down_proj"]}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(settings))
    command = ["convert", source, tmp_path / "out", "--dtype", "float16", "--adapter", tmp_path / "adapter"]
    for form in ("hf", "base"):
        assert cli.main([*map(str, command), "--to", form]) == 2
        assert "NaN or infinity in " in (error := capsys.readouterr().err) and "as float16" in error
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_writers_write_finite_numbers(tmp_path, bad, dtype):
    tensors = {"good": np.ones(2, dtype), "numbers": np.ones(2, np.int8), "bad": np.array([1, bad], dtype)}
    with user_error("NaN or infinity in tensor bad", np.dtype(dtype).name):
        save_safetensors(tmp_path / "x.safetensors", tensors)
    pytest.importorskip("torch")
    with user_error("NaN or infinity in tensor bad"):
        save_torch(tmp_path / "x.pth", tensors.items(), {})
    assert not list(tmp_path.iterdir())


def test_a_base_checkpoint_of_finite_numbers(tmp_path):
    model, _ = load_llama(write_folder(tmp_path / "in", CONFIG, random_weights(CONFIG)), **FLOAT32)
    model.final_norm.scale[...] = model.final_norm.scale[...].at[3].set(np.inf)
    (tmp_path / "out").mkdir()
    with user_error("NaN or infinity in the parameter final_norm.scale, stored as float32"):
        save_base(tmp_path / "out", model, source="x")
    assert not list((tmp_path / "out").iterdir())

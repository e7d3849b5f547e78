"""LLaMA in from every format and out as a Hugging Face folder, against torch where it is installed."""

import dataclasses
import json
from functools import partial

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from emollama_jax.models.llama import LlamaConfig
from emollama_jax.models.lora import LoRAConfig, adapters
from emollama_jax.weights.llama import architecture
from emollama_jax.weights.pretrained import load_base_tokenizer, load_llama, save_hugging_face
from emollama_jax.weights.sources import open_source
from tests.weights.tiny import (
    FLOAT32,
    REFERENCE,
    CountingSource,
    assert_bit_equal,
    assert_close,
    assert_holds,
    flax_names,
    logits_of,
    random_weights,
    save_flax,
    save_torch,
    settings_of,
    stored_values,
    tiny_config,
    torch_logits,
    torch_model,
    user_error,
    write_config,
    write_folder,
    write_gguf,
    write_sharded,
)

VARIANTS = {
    "mha": tiny_config(num_kv_heads=4, head_dim=16),
    "gqa": tiny_config(),
    "tied": tiny_config(tie_embeddings=True, num_kv_heads=1, rms_norm_eps=1e-6, rope_theta=1e5),
}
SAVE = {
    "model.safetensors": partial(save_file, metadata={"format": "pt"}),
    "pytorch_model.bin": save_torch,
    "flax_model.msgpack": save_flax,
}
MIXED = [np.float32, np.float16, ml_dtypes.bfloat16]


def load_float32(where, **kwargs):
    return load_llama(where, **{**FLOAT32, **kwargs})


# --- in ---


@pytest.mark.smoke
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("main", SAVE)
def test_every_format_gives_the_same_numbers(tmp_path, main, variant):
    config = VARIANTS[variant]
    weights = random_weights(config)
    if variant == "mha":
        write_config(tmp_path, config)
        SAVE[main](weights, tmp_path / main)
    else:
        write_sharded(tmp_path, config, weights, main, SAVE[main])
    model, report = load_float32(tmp_path, remat="none")
    assert model.config == dataclasses.replace(config, attention="chunked")
    names = flax_names(weights) if main == "flax_model.msgpack" else weights
    assert sorted(report.read) == sorted(names)
    assert_holds(model, weights)


@pytest.mark.parametrize("main", SAVE)
def test_mixed_dtypes(tmp_path, main):
    """Each tensor is cast by itself: a float16 number would lose bits in bfloat16, and a large one its value."""
    config = tiny_config(num_layers=2, num_kv_heads=4)
    weights = {n: v.astype(MIXED[i % 3]) for i, (n, v) in enumerate(random_weights(config).items())}
    write_config(tmp_path, config)
    if main == "pytorch_model.bin":
        torch = pytest.importorskip("torch")
        of = {np.float32: torch.float32, np.float16: torch.float16, ml_dtypes.bfloat16: torch.bfloat16}
        tensors = {n: torch.tensor(v.astype(np.float32)).to(of[v.dtype.type]) for n, v in weights.items()}
        torch.save(tensors, tmp_path / main)
    else:
        SAVE[main](weights, tmp_path / main)
    assert_holds(load_float32(tmp_path)[0], weights)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_gguf(tmp_path, kind):
    """The same bits as the safetensors folder for F32; else what the gguf package itself makes of the file."""
    config = VARIANTS["mha" if kind == "Q8_0" else "tied" if kind == "Q4_1" else "gqa"]
    weights = random_weights(config)
    stored = write_gguf(tmp_path / "tiny.gguf", config, weights, kind)
    model, report = load_float32(tmp_path / "tiny.gguf", remat="none")
    assert model.config == dataclasses.replace(config, attention="chunked")
    assert len(report.read) == len(weights)
    assert_holds(model, stored)
    if kind == "F32":
        assert_bit_equal(stored, weights)


def test_gguf_has_the_tokenizer_of_the_folder(tmp_path):
    config = tiny_config(num_layers=1)
    write_gguf(tmp_path / "tiny.gguf", config, random_weights(config))
    with open_source(tmp_path / "tiny.gguf") as source:
        tokenizers = [load_base_tokenizer(where, 640) for where in (source, source.path, str(source.path), REFERENCE)]
    text = "[INST] She smiles, but her voice trembles. [/INST]"
    assert len({tuple(tokenizer.encode(text)) for tokenizer in tokenizers}) == 1
    assert {(tokenizer.bos_id, tokenizer.eos_id) for tokenizer in tokenizers} == {(1, 2)}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("max_shard_size", ["1GB", "200KB"])
def test_what_torch_saves_has_torchs_logits(tmp_path, variant, max_shard_size):
    config = VARIANTS[variant]
    theirs = torch_model(config, random_weights(config))
    theirs.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "200KB")
    ours, _ = load_float32(tmp_path)
    assert_close(logits_of(ours), torch_logits(theirs))


def test_a_torch_file_of_a_tied_model_repeats_the_embedding(tmp_path):
    config = VARIANTS["tied"]
    weights = random_weights(config)
    write_config(tmp_path, config)
    save_torch(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}, tmp_path / "pytorch_model.bin")
    model, report = load_float32(tmp_path)
    assert report.dropped == ("lm_head.weight",)
    assert_holds(model, weights)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("max_shard_size", ["1GB", "200KB"])
def test_what_the_flax_class_saves(tmp_path, max_shard_size):
    """Torch's weights turned into Flax's by transformers itself."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    flax_llama = getattr(transformers, "FlaxLlamaForCausalLM", None)
    if flax_llama is None or int(transformers.__version__.split(".")[0]) >= 5:
        pytest.skip(f"transformers {transformers.__version__} has no Flax models")
    config = VARIANTS["mha"]
    weights = random_weights(config)
    save_torch(weights, write_folder(tmp_path / "torch", config, weights) / "pytorch_model.bin")
    theirs = flax_llama.from_pretrained(tmp_path / "torch", from_pt=True)
    theirs.save_pretrained(tmp_path / "flax", max_shard_size=max_shard_size)
    assert (tmp_path / "flax/flax_model.msgpack.index.json").exists() == (max_shard_size == "200KB")
    assert not list((tmp_path / "flax").glob("*.safetensors"))
    assert_holds(load_float32(tmp_path / "flax")[0], weights)


def test_reference_model():
    """A folder of transformers 4.35 in float16."""
    model, report = load_float32(REFERENCE)
    weights = load_file(REFERENCE / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {np.dtype("float16")}
    assert report.dropped == tuple(sorted(name for name in weights if "inv_freq" in name))
    assert_holds(model, {name: value for name, value in weights.items() if name not in report.dropped})


def test_reference_model_has_torchs_logits():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM.from_pretrained(REFERENCE, torch_dtype=torch.float32).eval()
    assert_close(logits_of(load_float32(REFERENCE)[0]), torch_logits(theirs))


# --- the configuration ---


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({}, {}),
        ({"head_dim": None, "num_attention_heads": 2, "num_key_value_heads": None}, {"num_heads": 2, "head_dim": 32}),
        ({"rope_theta": None}, {"rope_theta": 10000.0}),
        ({"rope_theta": 500000}, {"rope_theta": 500000.0}),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 7e4, "rope_type": "default"}}, {"rope_theta": 7e4}),
        ({"rope_scaling": {"type": "default"}}, {}),
        ({"tie_word_embeddings": None}, {"tie_embeddings": False}),
        ({"pad_token_id": 0, "pretraining_tp": 1, "use_cache": True}, {}),
    ],
)
def test_config_json(settings, changes):
    """Keys that old versions did not write have the values that those versions meant; unknown ones are ignored."""
    config = tiny_config(**changes)
    given = {name: value for name, value in (settings_of(config) | settings).items() if value is not None}
    assert LlamaConfig(**architecture(CountingSource({}, given)), **FLOAT32, remat="none") == config


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model_type": "mistral"}, ["the model is a mistral, not a llama"]),
        ({"model_type": None}, ["not a llama"]),
        ({"attention_bias": True}, ["the model has biases", "without"]),
        ({"mlp_bias": True}, ["the model has biases"]),
        ({"hidden_act": "gelu"}, ["activation gelu"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["scaled rotary positions"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["scaled rotary positions"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, ["scaled rotary positions"]),
        ({"hidden_size": None}, ["lacks 'hidden_size'"]),
        ({"rms_norm_eps": None}, ["lacks 'rms_norm_eps'"]),
        ({"num_attention_heads": 5}, ["unusable configuration", "num_heads=5", "num_kv_heads=2"]),
        ({"num_hidden_layers": 0}, ["num_layers=0"]),
        ({"head_dim": 25}, ["head_dim=25"]),
        ({"hidden_size": "64"}, ["unusable configuration", "copy it again"]),
        ({"hidden_size": [64]}, ["unusable configuration", "copy it again"]),
        ({"num_hidden_layers": 3.5}, ["unusable configuration", "copy it again"]),
        ({"rope_theta": "high"}, ["unusable configuration", "copy it again"]),
        (
            {"num_attention_heads": 0, "num_key_value_heads": None, "head_dim": None},
            ["unusable configuration", "copy it again"],
        ),
    ],
)
def test_unusable_config_json(tmp_path, settings, words):
    config = tiny_config(num_layers=1)
    write_folder(tmp_path, config, {}, **settings)
    with user_error(str(tmp_path), *words):
        load_float32(tmp_path)


def test_no_config_json(tmp_path):
    config = tiny_config(num_layers=1)
    (write_folder(tmp_path, config, random_weights(config)) / "config.json").unlink()
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with user_error(f"no config.json beside the weights: {path}; copy it"):
            load_float32(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "qwen2"}, ["the model is a qwen2, not a llama"]),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, ["scaled rotary positions"]),
    ],
)
def test_unusable_gguf(tmp_path, changes, words):
    config = tiny_config(num_layers=1)
    write_gguf(tmp_path / "tiny.gguf", config, random_weights(config), **changes)
    with user_error(str(tmp_path / "tiny.gguf"), *words):
        load_float32(tmp_path / "tiny.gguf")


def test_gguf_without_what_the_architecture_needs(tmp_path):
    config = tiny_config(num_layers=1)
    write_gguf(tmp_path / "tiny.gguf", config, random_weights(config))
    with open_source(tmp_path / "tiny.gguf") as source:
        del source.config["llama.block_count"]
        with user_error("lacks 'llama.block_count'", "tiny.gguf"):
            load_float32(source)


def test_gguf_of_a_model_with_per_layer_heads(tmp_path):
    config = tiny_config(num_layers=1)
    write_gguf(tmp_path / "tiny.gguf", config, random_weights(config))
    with open_source(tmp_path / "tiny.gguf") as source:
        source.config["llama.attention.head_count"] = [4, 2]
        with user_error("unusable configuration", "tiny.gguf"):
            load_float32(source)


@pytest.mark.parametrize("what", ["missing", "bias", "qk_norm"])
def test_folder_of_another_variant(tmp_path, what):
    """Tensors that the configuration does not announce."""
    config = tiny_config(num_layers=1)
    weights = random_weights(config)
    match what:
        case "missing":
            del weights["lm_head.weight"]  # not tied, says config.json
        case "bias":
            weights["model.layers.0.self_attn.q_proj.bias"] = np.zeros(96, np.float32)
        case _:
            weights["model.layers.0.self_attn.q_norm.weight"] = np.ones(24, np.float32)
    words = {"missing": "1 missing: lm_head.weight", "bias": "q_proj.bias", "qk_norm": "q_norm.weight"}
    with user_error(str(tmp_path), words[what]):
        load_float32(write_folder(tmp_path, config, weights))


def test_truncated_file(tmp_path):
    config = tiny_config(num_layers=1)
    file = write_folder(tmp_path, config, random_weights(config)) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with user_error(str(file), "cut short", "again"):
        load_float32(tmp_path)


def test_tokenizer_larger_than_the_vocabulary(tmp_path):
    config = tiny_config(num_layers=1, vocab_size=639)
    write_folder(tmp_path, config, random_weights(config))
    model, _ = load_float32(tmp_path)
    with user_error("640 ids", "639", str(tmp_path), "use the tokenizer"):
        load_base_tokenizer(tmp_path, model.config.vocab_size)


def test_no_tokenizer(tmp_path):
    config = tiny_config(num_layers=1)
    (write_folder(tmp_path, config, random_weights(config)) / "tokenizer.model").unlink()
    with user_error(str(tmp_path), "tokenizer"):
        load_base_tokenizer(tmp_path, 640)


# --- out ---


def adapted(folder, targets=("q_proj", "v_proj"), **execution):
    """The model in a folder with adapters that are not zero."""
    model, _ = load_float32(folder, lora=LoRAConfig(rank=4, alpha=6.0, targets=targets), **execution)
    for number, (_, layer) in enumerate(adapters(model)):
        b = np.random.default_rng(number).normal(0, 0.5, layer.lora_b.shape)
        layer.lora_b[...] = b.astype(np.float32)
    return model


def save(folder, model, **kwargs):
    folder.mkdir()
    save_hugging_face(folder, model, load_base_tokenizer(REFERENCE, 640), **kwargs)
    return folder


def read_by_torch(folder):
    """torch's model from a folder, which it loads without a word."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, found = transformers.LlamaForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, output_loading_info=True
    )
    assert not any(found.values()), found
    return model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each variant."""
    where = tmp_path_factory.mktemp("variants")
    return {name: write_folder(where / name, config, random_weights(config)) for name, config in VARIANTS.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_folder_is_the_one_loaded(tmp_path, folders, variant):
    """The same tensors under the same names, and a configuration that says the same."""
    model, _ = load_float32(folders[variant], remat="none")
    saved = save(tmp_path / "out", model)
    assert_bit_equal(load_file(saved / "model.safetensors"), load_file(folders[variant] / "model.safetensors"))
    settings = json.loads((saved / "config.json").read_text())
    expected = {k: v for k, v in settings_of(VARIANTS[variant]).items() if v is not None}
    assert {name: settings[name] for name in expected} == expected
    assert (settings["bos_token_id"], settings["eos_token_id"], settings["torch_dtype"]) == (1, 2, "float32")
    again, report = load_float32(saved, remat="none")
    assert again.config == model.config
    assert_bit_equal(stored_values(again), stored_values(model))
    assert load_base_tokenizer(saved, 640).encode("a</s>b") == load_base_tokenizer(REFERENCE, 640).encode("a</s>b")


@pytest.mark.parametrize("variant", VARIANTS)
def test_torch_reads_the_saved_folder(tmp_path, folders, variant):
    model, _ = load_float32(folders[variant])
    assert_close(logits_of(model), torch_logits(read_by_torch(save(tmp_path / "out", model))))


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")])
def test_merged_adapters(tmp_path, folders, targets):
    model = adapted(folders["gqa"], targets)
    before = logits_of(model)
    merged = save(tmp_path / "merged", model, merge_adapters=True)
    theirs = torch_logits(read_by_torch(merged))
    assert_close(before, theirs)
    np.testing.assert_array_equal(logits_of(model), before)  # the model itself is as it was
    left_out = save(tmp_path / "left_out", model)
    assert_bit_equal(load_file(left_out / "model.safetensors"), load_file(folders["gqa"] / "model.safetensors"))
    assert np.max(np.abs(torch_logits(read_by_torch(left_out)) - theirs)) > 0.1


@pytest.mark.parametrize(("dtype", "bound"), [("int8", 0.02), ("nf4", 0.3)])
def test_quantised_models_are_saved_as_plain_numbers(tmp_path, folders, dtype, bound):
    """Dequantised and nothing else: torch computes the logits of our quantised model; with the adapters as well.

    Against the weights before quantisation, the largest error of a kernel is bounded relative to its largest number.
    """
    model = adapted(folders["gqa"], kernel_dtype=dtype)
    assert_close(
        logits_of(model),
        torch_logits(read_by_torch(save(tmp_path / "merged", model, dtype="float32", merge_adapters=True))),
    )
    saved = load_file(save(tmp_path / "plain", model, dtype="float32") / "model.safetensors")
    original = load_file(folders["gqa"] / "model.safetensors")
    assert set(saved) == set(original)
    errors = {n: np.max(np.abs(saved[n] - original[n])) / np.max(np.abs(original[n])) for n in saved}
    print(f"{dtype}: worst kernel error {max(errors.values()):.4f}")
    assert 0 < max(errors.values()) < bound
    assert {n for n, e in errors.items() if e} == {n for n in saved if "_proj" in n}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_of_the_saved_folder(tmp_path, folders, dtype):
    model, _ = load_float32(folders["gqa"])
    saved = save(tmp_path / "out", model, dtype=dtype)
    original = load_file(folders["gqa"] / "model.safetensors")
    expected = {name: value.astype(np.dtype(dtype)) for name, value in original.items()}
    assert_bit_equal(load_file(saved / "model.safetensors"), expected)
    assert json.loads((saved / "config.json").read_text())["torch_dtype"] == dtype

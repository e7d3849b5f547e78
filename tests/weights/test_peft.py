"""Adapters out for PEFT and in from PEFT, by the library itself where torch is installed."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from emollama_jax.models.lora import LoRAConfig, adapters
from emollama_jax.weights.peft import adapter_config, load_adapter, save_adapter
from emollama_jax.weights.pretrained import load_llama
from tests.weights.tiny import (
    FLOAT32,
    assert_bit_equal,
    assert_close,
    logits_of,
    random_weights,
    stored_values,
    tiny_config,
    torch_logits,
    torch_model,
    user_error,
    write_folder,
)

CONFIG = tiny_config(num_layers=2)
TARGETS = {
    "attention": ("q_proj", "v_proj"),
    "all": ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"),
}
LORA = LoRAConfig(rank=6, alpha=10.0, dropout=0.1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("base"), CONFIG, random_weights(CONFIG))


def with_adapters(base, lora=LORA, filled=True):
    """Our model with adapters, A and B random."""
    model, _ = load_llama(base, lora=lora, **FLOAT32)
    for number, (_, layer) in enumerate(adapters(model)):
        if filled:
            rng = np.random.default_rng(number)
            layer.lora_a[...] = rng.normal(0, 0.2, layer.lora_a.shape).astype(np.float32)
            layer.lora_b[...] = rng.normal(0, 0.2, layer.lora_b.shape).astype(np.float32)
    return model


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    """(our model, the folder its adapters were written to); tests only look at them."""
    model, folder = with_adapters(base), tmp_path_factory.mktemp("adapter")
    save_adapter(folder, model, base="tiny")
    return model, folder


@pytest.fixture(scope="module")
def blank(base):
    """A model whose adapters a test may fill; what they held before is anyone's guess."""
    return with_adapters(base, filled=False)


@pytest.fixture(scope="module")
def plain(base):
    """The model without adapters."""
    return load_llama(base, **FLOAT32)[0]


@pytest.fixture
def copy(saved, tmp_path):
    """Writes a copy of the adapter folder whose settings and tensors a test may change."""

    def write(settings=None, tensors=None):
        _, folder = saved
        given = json.loads((folder / "adapter_config.json").read_text()) | (settings or {})
        (tmp_path / "adapter_config.json").write_text(json.dumps(given))
        weights = load_file(folder / "adapter_model.safetensors")
        save_file((tensors or dict)(weights), tmp_path / "adapter_model.safetensors")
        return tmp_path

    return write


def adapter_values(model):
    return {path: value for path, value in stored_values(model).items() if "lora_" in path}


# --- with PEFT itself ---


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_peft_reads_what_we_write(base, tmp_path, targets):
    peft = pytest.importorskip("peft")
    model = with_adapters(base, LoRAConfig(rank=6, alpha=10.0, targets=targets))
    save_adapter(tmp_path, model, base="tiny")
    theirs = torch_model(CONFIG, random_weights(CONFIG))
    plain = torch_logits(theirs)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    assert_close(logits_of(model), torch_logits(theirs))
    assert np.max(np.abs(torch_logits(theirs) - plain)) > 0.1
    state = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    assert_bit_equal({n: v.numpy() for n, v in state.items()}, load_file(tmp_path / "adapter_model.safetensors"))


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_we_read_what_peft_writes(base, tmp_path, targets, safe):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    settings = peft.LoraConfig(
        r=5, lora_alpha=7, lora_dropout=0.05, target_modules=list(targets), task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(torch_model(CONFIG, random_weights(CONFIG)), settings).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    theirs.save_pretrained(tmp_path, safe_serialization=safe, save_embedding_layers=False)
    lora = adapter_config(tmp_path)
    assert lora == LoRAConfig(rank=5, alpha=7.0, dropout=0.05, targets=targets)
    model = with_adapters(base, lora, filled=False)
    report = load_adapter(model, tmp_path)
    state = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    assert set(report.read) == set(state)
    assert_close(logits_of(model), torch_logits(theirs))
    for path, value in adapter_values(model).items():
        *_, module, leaf = path.split(".")
        for layer in range(2):
            block = "self_attn" if ".attn." in path else "mlp"
            name = f"base_model.model.model.layers.{layer}.{block}.{module}.lora_{leaf[-1].upper()}.weight"
            np.testing.assert_array_equal(value[layer], state[name].numpy().T)
    (tmp_path / "again").mkdir()
    save_adapter(tmp_path / "again", model)
    again = load_file(tmp_path / "again/adapter_model.safetensors")
    assert_bit_equal(again, {name: value.numpy() for name, value in state.items()})


# --- round trip ---


@pytest.mark.smoke
def test_round_trip(blank, saved):
    model, folder = saved
    assert adapter_config(folder) == LORA
    weights = load_file(folder / "adapter_model.safetensors")
    block = "base_model.model.model.layers"
    names = {f"{block}.{i}.self_attn.{n}_proj.lora_{x}.weight" for i in range(2) for n in "qv" for x in "AB"}
    assert set(weights) == names
    assert weights[f"{block}.0.self_attn.v_proj.lora_A.weight"].shape == (6, 64)
    assert weights[f"{block}.0.self_attn.v_proj.lora_B.weight"].shape == (48, 6)
    report = load_adapter(blank, folder)
    assert set(report.read) == names
    assert_bit_equal(stored_values(blank), stored_values(model))


def test_the_adapters_name_may_be_spelled_out(blank, saved, copy):
    spelled = lambda weights: {name.replace(".weight", ".default.weight"): value for name, value in weights.items()}
    load_adapter(blank, copy(tensors=spelled))
    assert_bit_equal(adapter_values(blank), adapter_values(saved[0]))


def test_half_precision_files(blank, saved, copy):
    half = lambda weights: {name: value.astype(np.float16) for name, value in weights.items()}
    load_adapter(blank, copy(tensors=half))
    expected = {p: np.asarray(v).astype(np.float16).astype(np.float32) for p, v in adapter_values(saved[0]).items()}
    assert_bit_equal(adapter_values(blank), expected)


def test_the_scale_survives_division(saved, tmp_path):
    """PEFT keeps alpha, the model alpha / rank: the way back may round, but not into another scale."""
    model, _ = saved
    (_, one), (_, other) = adapters(model)
    for alpha in (1.0, 0.1, 2 / 3, 16.0, 1e-3):
        one.scale = other.scale = alpha / 6
        folder = tmp_path / str(alpha)
        folder.mkdir()
        save_adapter(folder, model)
        load_adapter(model, folder)
    one.scale = other.scale = LORA.alpha / LORA.rank


def test_a_model_without_adapters_has_none_to_save(plain, tmp_path):
    with pytest.raises(ValueError, match="no adapters"):
        save_adapter(tmp_path, plain)


# --- errors ---


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("peft_type", "LOHA"),
        ("use_dora", True),
        ("use_qalora", True),
        ("fan_in_fan_out", True),
        ("modules_to_save", ["lm_head"]),
        ("layer_replication", [[0, 1]]),
        ("lora_bias", True),
        ("trainable_token_indices", [3]),
        ("target_parameters", ["mlp.experts"]),
        ("alora_invocation_tokens", [1, 2]),
    ],
)
def test_settings_of_other_adapters(copy, name, value):
    folder = copy({name: value})
    with user_error(f"adapter setting {name}={value!r}", str(folder / "adapter_config.json"), "plain LoRA"):
        adapter_config(folder)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": [1]}, "target_modules"),
        ({"r": None}, "r=None"),
        ({"r": 0}, "r=0"),
        ({"r": -1}, "r=-1"),
        ({"r": "6"}, "r='6'"),
        ({"lora_alpha": None}, ""),
        ({"lora_alpha": "x"}, ""),
        ({"lora_dropout": 1.5}, "dropout"),
    ],
)
def test_unusable_settings(copy, settings, word):
    folder = copy(settings)
    with user_error("unusable adapter settings", str(folder / "adapter_config.json"), "save the adapter again", word):
        adapter_config(folder)


@pytest.mark.parametrize("name", ["r", "lora_alpha", "target_modules"])
def test_missing_settings(copy, name):
    folder = copy()
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != name}))
    with user_error(str(file), name, "save the adapter again"):
        adapter_config(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null"])
def test_settings_that_are_no_object(copy, content):
    folder = copy()
    (folder / "adapter_config.json").write_text(content)
    with user_error(str(folder / "adapter_config.json")):
        adapter_config(folder)


def test_no_settings(copy, tmp_path):
    folder = copy()
    (folder / "adapter_config.json").unlink()
    for where in (folder, folder / "nothing", folder / "adapter_model.safetensors"):
        with user_error("adapter_config.json", str(where), "save_pretrained"):
            adapter_config(where)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_modules": ["q_proj", "k_proj"]}, ["on k_proj, q_proj", "the model's on q_proj, v_proj"]),
        ({"lora_alpha": 12}, ["scale 2", "with 1.66667", "rank 6, alpha 12"]),
        ({"r": 5}, ["scale 2", "with 1.66667"]),
    ],
)
def test_adapters_that_are_not_the_models(saved, copy, settings, words):
    folder = copy(settings)
    with user_error(str(folder), "lora.targets, lora.rank and lora.alpha", *words):
        load_adapter(saved[0], folder)


def test_a_model_without_adapters_takes_none(plain, copy):
    with user_error("the model's on nothing with none"):
        load_adapter(plain, copy())


def test_another_rank_of_the_same_scale(saved, copy):
    model, _ = saved
    before = adapter_values(model)
    half = lambda weights: {n: np.ascontiguousarray(v[:3] if "A" in n else v[:, :3]) for n, v in weights.items()}
    folder = copy({"r": 3, "lora_alpha": 5.0}, half)
    with user_error("8 of the wrong shape", "is [3, 64], not [6, 64]", str(folder)):
        load_adapter(model, folder)
    assert_bit_equal(adapter_values(model), before)


@pytest.mark.parametrize("what", ["missing", "extra", "layer", "nan", "truncated"])
def test_damaged_adapters(saved, copy, what):
    model, _ = saved
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"

    def change(weights):
        match what:
            case "missing":
                del weights[name]
            case "extra":
                weights["base_model.model.model.embed_tokens.lora_embedding_A"] = np.zeros((6, 640), np.float32)
            case "layer":
                weights[name.replace(".1.", ".2.")] = weights[name]
            case "nan":
                weights[name][0, 0] = np.nan
        return weights

    folder = copy(tensors=change)
    if what == "truncated":
        file = folder / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-3])
    before = adapter_values(model)
    words = {
        "missing": f"1 missing: {name}",
        "extra": "1 unknown: base_model.model.model.embed_tokens.lora_embedding_A",
        "layer": "layers.2.self_attn.q_proj.lora_B.weight",
        "nan": f"{name} holds NaN",
        "truncated": "adapter_model.safetensors",
    }
    with user_error(str(folder), words[what]):
        load_adapter(model, folder)
    assert_bit_equal(adapter_values(model), before)

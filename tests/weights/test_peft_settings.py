"""Settings of adapters that are computed, by the deltas that PEFT itself computes; and those that are refused."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from emollama_jax.models.lora import LoRAConfig, merged_kernel
from emollama_jax.weights.peft import adapter_config, find_adapter, load_adapter, open_adapter
from emollama_jax.weights.peft_settings import AdapterSettings
from emollama_jax.weights.pretrained import load_llama
from tests.weights.tiny import FLOAT32, random_weights, tiny_config, torch_model, user_error, write_folder

CONFIG = tiny_config(num_layers=3)
LINEAR = [
    f"model.layers.{i}.{name}"
    for i in range(3)
    for name in (*(f"self_attn.{n}_proj" for n in "qkvo"), *(f"mlp.{n}_proj" for n in ("gate", "up", "down")))
]


@pytest.fixture(scope="module")
def peft_adapter():
    """Makes a PEFT model of the tiny base with random adapters and saves them; every layer's delta by its path."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    plain = torch_model(CONFIG, random_weights(CONFIG))

    def make(folder, **settings):
        settings = {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["q_proj", "v_proj"],
            "task_type": "CAUSAL_LM",
        } | settings
        model = peft.get_peft_model(plain, peft.LoraConfig(**settings))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder, save_embedding_layers=False)
        modules = dict(model.base_model.model.named_modules())
        deltas = {
            name: modules[name].get_delta_weight("default").detach().numpy()
            for name in LINEAR
            if hasattr(modules[name], "get_delta_weight")
        }
        model.unload()
        return deltas

    return make


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"use_rslora": True, "rank_pattern": {"v_proj": 9}},
        {"rank_pattern": {"v_proj": 8}, "alpha_pattern": {"v_proj": 32}},
        {
            "rank_pattern": {r"layers\.1\..*q_proj": 2, "q_proj": 3},
            "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 5},
        },
        {"target_modules": r".*\.(q_proj|up_proj)"},
        {"target_modules": "All-Linear"},
        {"target_modules": ["self_attn.q_proj", "mlp.down_proj"]},
        {"target_modules": ["model.layers.0.self_attn.k_proj", "layers.2.mlp.gate_proj", "query"]},
        {"layers_to_transform": [0, 2]},
        {"layers_to_transform": 1, "layers_pattern": "layers"},
        {"exclude_modules": r".*\.1\..*"},
        {"exclude_modules": ["layers.0.self_attn.q_proj", "v_proj"]},
        {"bias": "lora_only"},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": False},
    ],
    ids=lambda settings: ",".join(settings),
)
def test_what_an_adapter_adds_is_what_peft_adds(peft_adapter, tmp_path, settings):
    """To every layer: one rank and one scale for all hold whatever the settings say."""
    expected = peft_adapter(tmp_path, **settings)
    lora, source = open_adapter(tmp_path, 3)
    assert 0 < len(expected) <= len(LINEAR)
    for module in LINEAR:
        if module.split(".")[-1] not in lora.targets:
            assert module not in expected
            continue
        a, b = (source.read(f"base_model.model.{module}.lora_{x}.weight") for x in "AB")
        assert (a.shape[0], b.shape[1]) == (lora.rank, lora.rank)
        delta = lora.alpha / lora.rank * b.astype(np.float64) @ a
        np.testing.assert_allclose(delta, expected.get(module, np.zeros_like(delta)), rtol=0, atol=1e-5)


def test_an_adapter_of_several_ranks_goes_into_a_model(peft_adapter, tmp_path):
    expected = peft_adapter(
        tmp_path / "adapter", rank_pattern={"v_proj": 7}, alpha_pattern={"q_proj": 9}, exclude_modules=r".*\.1\..*"
    )
    base = write_folder(tmp_path / "base", CONFIG, random_weights(CONFIG))
    lora = adapter_config(tmp_path / "adapter", 3)
    assert lora == LoRAConfig(rank=7, alpha=9 / 4 * 7, dropout=0.0, targets=("q_proj", "v_proj"))
    model, _ = load_llama(base, lora=lora, **FLOAT32)
    before = {name: np.asarray(getattr(model.layers.attn, name).kernel[...]) for name in lora.targets}
    load_adapter(model, tmp_path / "adapter")
    for name in lora.targets:
        added = np.asarray(merged_kernel(getattr(model.layers.attn, name))) - before[name]
        for layer in range(3):
            delta = expected.get(f"model.layers.{layer}.self_attn.{name}", np.zeros(added[layer].T.shape))
            assert (layer == 1) == (not np.any(delta))
            np.testing.assert_allclose(added[layer].T, delta, rtol=0, atol=1e-5)


# --- files by hand ---


@pytest.fixture
def write(tmp_path):
    """Writes an adapter of rank 2 on q_proj of two layers, with settings of its own."""

    def make(folder=tmp_path, modules=(0, 1), **settings):
        folder.mkdir(exist_ok=True)
        given = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]} | settings
        (folder / "adapter_config.json").write_text(json.dumps(given))
        name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
        shapes = {"A": (2, 5), "B": (3, 2)}
        tensors = {name.format(i, x): np.full(shapes[x], i + 1, np.float32) for i in modules for x in "AB"}
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    return make


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("init_lora_weights", how) for how in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga")),
        ("init_lora_weights", "a new one"),
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("a_setting_of_tomorrow", 0.5),
        ("peft_type", None),
    ],
)
def test_what_changes_more_than_the_adapters_layers_is_refused(write, name, value):
    with user_error(f"adapter setting {name}={value!r}", "adapter_config.json", "merge_and_unload(), save that model"):
        open_adapter(write(**{name: value}))


def test_settings_that_say_nothing_are_none(write):
    folder = write(
        init_lora_weights=True, a_setting_of_tomorrow=None, another=[], megatron_core="megatron.core", bias="all"
    )
    assert adapter_config(folder) == LoRAConfig(rank=2, alpha=4.0, dropout=0.0, targets=("q_proj",))


def test_every_linear_layer_of_the_blocks():
    settings = AdapterSettings(r=4, lora_alpha=3.0, target_modules="all-linear")
    assert all(settings.adapter(module) == (4, 3.0) for module in LINEAR)
    assert settings.adapter("lm_head") is settings.adapter("model.embed_tokens") is None


@pytest.mark.parametrize("targets", ["lm_head", ["q_proj", "embed_tokens"]])
def test_adapters_outside_the_blocks_are_refused(write, targets):
    where = targets if isinstance(targets, str) else "model.embed_tokens"
    with user_error(f"adapters on {where}", "merge_and_unload"):
        open_adapter(write(target_modules=targets))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_modules": "(q_proj"}, ["no regular expression"]),
        ({"rank_pattern": {"(": 3}}, ["no regular expression"]),
        ({"rank_pattern": {"q_proj": 0}}, ["rank_pattern[q_proj]=0 is no number above 0"]),
        ({"alpha_pattern": {"q_proj": "x"}}, ["alpha_pattern[q_proj]='x' is no number above 0"]),
        ({"lora_alpha": 0}, ["lora_alpha=0 is no number above 0"]),
        ({"layers_to_transform": "0"}, ["layers_to_transform='0'"]),
        ({"target_modules": ["query"]}, ["names no linear layer"]),
    ],
)
def test_settings_without_sense(write, settings, words):
    with user_error("unusable adapter settings", "save the adapter again", *words):
        open_adapter(write(**settings))


def test_an_adapter_where_the_settings_have_none(write):
    with user_error("1.self_attn.q_proj.lora_A.weight", "has no adapters there"):
        open_adapter(write(layers_to_transform=[0]))


def test_a_smaller_adapter_is_not_filled_up_unasked(write):
    """A rank that the settings do not name is the loader's to refuse."""
    _, source = open_adapter(write(r=4))
    assert source.shape("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight") == (2, 5)


def test_missing_layers_stay_missing(write):
    _, source = open_adapter(write(modules=(1,)), 3)
    assert [name for name in source.names() if "lora_A" in name] == [
        "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    ]


@pytest.mark.smoke
def test_a_named_adapter_lies_in_a_folder_of_its_name(write, tmp_path):
    write(tmp_path / "out", (0,)).rename(tmp_path / "emotion")
    assert find_adapter(tmp_path) == tmp_path / "emotion"
    assert adapter_config(tmp_path).rank == 2
    shutil.copytree(tmp_path / "emotion", tmp_path / "other")
    with user_error("adapters in emotion, other", str(tmp_path), "give one of these folders"):
        adapter_config(tmp_path)


def test_a_model_in_the_same_folder_is_not_the_adapter(write):
    folder = write()
    save_file({"model.norm.weight": np.ones(3, np.float32)}, folder / "model.safetensors")
    _, source = open_adapter(folder)
    assert set(source.names()) == set(load_file(folder / "adapter_model.safetensors"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_settings_as_windows_editors_save_them(write, encoding):
    file = write() / "adapter_config.json"
    file.write_bytes(file.read_text().encode(encoding))
    assert adapter_config(file.parent).rank == 2


def test_the_scale_of_rank_stabilised_lora():
    settings = AdapterSettings(r=4, lora_alpha=3.0, target_modules=["q_proj"], use_rslora=True)
    rank, alpha = settings.adapter("model.layers.0.self_attn.q_proj")
    assert (rank, alpha / rank) == (4, 3 / 2)

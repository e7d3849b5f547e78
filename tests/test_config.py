import ast
import dataclasses
import json
import re
from pathlib import Path

import pytest

from emollama_jax.config import (
    DEFAULT_SHARDING,
    Config,
    GenerateConfig,
    MeshConfig,
    TrainConfig,
    from_dict,
    load_config,
    parse_flags,
    to_dict,
)
from emollama_jax.config_history import RENAMED
from emollama_jax.config_table import config_table, field_docs
from emollama_jax.errors import UserError
from emollama_jax.models.llama import LlamaConfig
from emollama_jax.models.lora import LoRAConfig

CONFIGS = Path(__file__).parent.parent / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.py"))


def fails(*argv: str) -> str:
    """The one line a user reads for these arguments."""
    with pytest.raises(UserError) as caught:
        parse_flags(argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- files


@pytest.mark.smoke
@pytest.mark.parametrize("name", NAMES)
def test_every_config_loads_and_says_how_to_run_it(name):
    assert isinstance(load_config(name), Config)
    docstring = ast.get_docstring(ast.parse((CONFIGS / f"{name}.py").read_text()))
    assert re.search(rf"^    emollama \w+ --config {name}\b", docstring, re.MULTILINE)
    assert "Expected: " in docstring


def test_llama2_7b_is_the_reference_architecture():
    config = load_config("llama2_7b")
    assert config.lora == LoRAConfig(rank=64, alpha=16.0, dropout=0.05, targets=("q_proj", "v_proj"))
    expected = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_layers": 32,
        "num_heads": 32,
        "num_kv_heads": 32,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "tie_embeddings": False,
    }
    assert expected.items() <= dataclasses.asdict(config.llama).items()


def test_a_path_and_a_name_find_the_same_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(str(CONFIGS / "tiny.py")) == load_config("tiny")


def test_the_working_folder_comes_before_the_package(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    own = "from emollama_jax.config import Config\ndef get_config():\n    return Config(seed=7)\n"
    (tmp_path / "configs/tiny.py").write_text(own)
    monkeypatch.chdir(tmp_path)
    assert load_config("tiny").seed == 7
    assert load_config("configs/tiny.py").seed == 7
    assert load_config("smollm2_135m").llama.vocab_size == 49152


@pytest.mark.parametrize("name", ["tny", "tny.py", "configs/tny.py", "configs/tiny"])
def test_an_unknown_config_names_the_known_ones_and_the_nearest(name):
    with pytest.raises(UserError, match=f"{name}: .*did you mean tiny.*llama2_7b, .*smollm2_135m, .*tiny"):
        load_config(name)


@pytest.mark.parametrize(
    "code, message",
    [
        ("x = 1", "AttributeError.*get_config"),
        ("def get_config(", "SyntaxError"),
        ("def get_config():\n    return {}", "returned {}; it must return"),
        ("def get_config():\n    return Config(sed=1)", "TypeError.*sed"),
        (
            "def get_config():\n    return Config(mesh=MeshConfig(data=0))",
            r"py:3: ValueError: data=0: give a ",
        ),
    ],
)
def test_a_broken_config_file_is_one_line_that_names_it(tmp_path, code, message):
    path = tmp_path / "broken.py"
    path.write_text(f"from emollama_jax.config import Config, MeshConfig\n{code}\n")
    with pytest.raises(UserError, match=f"broken.*{message}") as caught:
        load_config(str(path))
    assert "\n" not in str(caught.value)


def test_a_wrong_type_in_a_config_file_is_found(tmp_path):
    path = tmp_path / "typed.py"
    code = "config = Config()\nobject.__setattr__(config, 'seed', 1.5)\n"  # Config(seed=1.5), as it is without beartype
    path.write_text(f"from emollama_jax.config import Config\n{code}def get_config():\n    return config\n")
    with pytest.raises(UserError, match=r"typed\.py: config\.seed: expected int, not 1\.5"):
        load_config(str(path))


# -- JSON

CHANGED = Config(
    llama=LlamaConfig(rope_theta=1e5, rms_norm_eps=1.0000000000000002e-6, scan_layers=False, attention="xla"),
    lora=LoRAConfig(rank=8, alpha=0.1, targets=("q_proj",)),
    mesh=MeshConfig(data=-1, fsdp=4),
    sharding=(*DEFAULT_SHARDING[:-1], ("lora_rank", ("fsdp", "tensor"))),
    train=TrainConfig(steps=7, warmup_steps=3, validation=("a:dev",), profile=(2, 3)),
    generate=GenerateConfig(temperature=0.7),
    seed=3,
)


@pytest.mark.parametrize("config", [Config(), CHANGED, load_config("tiny")], ids=["default", "changed", "tiny"])
def test_json_round_trip_is_exact(config):
    data = to_dict(config)
    assert json.loads(json.dumps(data)) == data
    assert from_dict(data) == from_dict(json.loads(json.dumps(data))) == config


def edited(path: str, value) -> dict:
    data = to_dict(Config())
    *groups, field = path.split(".")
    target = data
    for group in groups:
        target = target[group]
    target[field] = value
    return data


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("llama.num_layer", 3, r"config\.llama\.num_layer: no such field; did you mean config\.llama\.num_layers\?"),
        (
            "zzzz",
            3,
            r"config\.zzzz: no such field; config has llama, lora, eva_vit, mae, videomae, hubert, projectors",
        ),
        ("seed", "3", r"config\.seed: expected int, not '3'"),
        ("seed", True, r"config\.seed: expected int, not True"),
        ("seed", None, r"config\.seed: expected int, not None"),
        ("llama", 3, r"config\.llama: expected LlamaConfig, not 3"),
        ("llama.scan_layers", 1, r"config\.llama\.scan_layers: expected bool, not 1"),
        ("lora.alpha", "16", r"config\.lora\.alpha: expected float, not '16'"),
        ("lora.targets", "q_proj", r"config\.lora\.targets: expected tuple\[str, \.\.\.\], not 'q_proj'"),
        ("lora.targets", [1], r"config\.lora\.targets\[0\]: expected str, not 1"),
        ("sharding", [["batch"]], r"config\.sharding\[0\]: expected tuple"),
        ("mesh.fsdp", 0, r"config\.mesh\.fsdp=0: give a number of devices"),
    ],
)
def test_from_dict_names_what_is_wrong(path, value, message):
    with pytest.raises(UserError, match=message):
        from_dict(edited(path, value))


def test_a_missing_field_or_group_has_its_default():
    data = to_dict(CHANGED)
    del data["lora"]["rank"], data["generate"]
    assert from_dict(data) == dataclasses.replace(
        CHANGED, lora=dataclasses.replace(CHANGED.lora, rank=64), generate=GenerateConfig()
    )


def test_whole_numbers_serve_as_floats():
    assert from_dict(edited("lora.alpha", 16)) == Config()


# -- names of the release before

OLD_VALUES = {
    "data.row_length": 640,
    "train.accumulate": 4,
    "train.base": "B",
    "train.eva_vit": "E",
    "train.ln_vision": "L",
    "train.init_from": "T",
}


@pytest.mark.parametrize("old", RENAMED)
def test_old_names_of_fields_still_load_and_name_the_new(old, tmp_path, caplog):
    value, new = OLD_VALUES[old], RENAMED[old]
    saved, (group, name) = to_dict(Config()), old.split(".")
    new_group, new_name = new.split(".")
    saved[group][name] = value
    del saved[new_group][new_name]
    if new_group == "weights":
        del saved["weights"]
    expected = parse_flags([f"--config.{new}={value}"], Config())[0]
    assert not caplog.records
    assert from_dict(saved) == expected != Config()
    assert parse_flags([f"--config.{old}={value}"], Config())[0] == expected
    assert f"config.{old} is called config.{new} now" in caplog.text
    assert f"--config.{old} is called --config.{new} now" in caplog.text
    path = tmp_path / "old.py"
    code = f"def get_config():\n    return Config({group}={group.title()}Config({name}={value!r}))\n"
    path.write_text(f"from emollama_jax.config import Config, DataConfig, TrainConfig\n{code}")
    with pytest.raises(UserError, match=rf"old.py:3: TypeError: .*'{name}'; it is called {new} now"):
        load_config(str(path))


# -- flags


def test_flags_override_fields_and_leave_the_rest():
    config, rest = parse_flags(
        ["--out", "x", "--config", "tiny", "--config.llama.num_layers=5", "--config.lora.dropout", "1e-3", "in"]
        + ["--config.llama.scan_layers=false", "--config.llama.remat=none", "--", "--config.seed=9"]
    )
    tiny = load_config("tiny")
    llama = dataclasses.replace(tiny.llama, num_layers=5, scan_layers=False, remat="none")
    assert config == dataclasses.replace(tiny, llama=llama, lora=dataclasses.replace(tiny.lora, dropout=1e-3))
    assert rest == ["--out", "x", "in", "--", "--config.seed=9"]


def test_flags_may_be_parsed_again_and_in_any_order():
    first, _ = parse_flags(["--config.seed=1", "--config.seed=2", "--config=tiny"])
    second, _ = parse_flags(["--config=tiny"])
    assert (first.seed, second.seed) == (2, 42)
    assert second == load_config("tiny")


def test_an_older_table_of_sharding_keeps_the_mlp_split_as_it_was():
    old = tuple((name, "tensor" if name == "embed" else None) for name, _ in DEFAULT_SHARDING if name != "mlp_out")
    loaded = from_dict({**to_dict(Config()), "sharding": [list(rule) for rule in old]})
    assert dict(loaded.sharding) == {**dict(old), "mlp_out": "tensor"}


@pytest.mark.parametrize("value", ["('k_proj', 'o_proj')", '["k_proj", "o_proj"]', "k_proj,o_proj"])
def test_tuples_can_be_overridden(value):
    config, _ = parse_flags(["--config=tiny", f"--config.lora.targets={value}"])
    assert config.lora.targets == ("k_proj", "o_proj")


def test_a_single_word_and_nothing_are_tuples_too():
    assert parse_flags(["--config=tiny", "--config.lora.targets=k_proj"])[0].lora.targets == ("k_proj",)
    assert parse_flags(["--config=tiny", "--config.lora.targets=()"])[0].lora.targets == ()


def test_the_sharding_table_can_be_overridden():
    table = tuple((name, None) for name, _ in DEFAULT_SHARDING)
    assert parse_flags(["--config=tiny", f"--config.sharding={table!r}"])[0].sharding == table


@pytest.mark.parametrize(
    "flag, message",
    [
        (
            "--config.llama.num_layer=3",
            "--config.llama.num_layer: no such field; did you mean --config.llama.num_layers?",
        ),
        (
            "--config.lama.num_layers=3",
            "--config.lama.num_layers: no such field; did you mean --config.llama.num_layers?",
        ),
        (
            "--config.num_layers=3",
            "--config.num_layers: no such field; did you mean --config.llama.num_layers or "
            "--config.eva_vit.num_layers or --config.mae.num_layers or --config.videomae.num_layers or "
            "--config.hubert.num_layers?",
        ),
        (
            "--config.zzzz=3",
            "--config.zzzz: no such field; --config has llama, lora, eva_vit, mae, videomae, hubert, projectors, "
            "trainable, clip, prompt, data, weights, train, mesh, sharding, generate, seed",
        ),
        ("--config.seed=abc", "--config.seed: expected int, not 'abc'"),
        ("--config.seed=1.5", "--config.seed: expected int, not '1.5'"),
        ("--config.lora.alpha=x", "--config.lora.alpha: expected float, not 'x'"),
        ("--config.llama.scan_layers=perhaps", "--config.llama.scan_layers: expected bool, not 'perhaps'"),
        ("--config.lora.targets=(1,)", "--config.lora.targets[0]: expected str, not 1"),
        ("--config.lora.targets=(a b", "--config.lora.targets: expected tuple[str, ...], not '(a b'"),
        ("--config.seed.x=3", "--config.seed.x: --config.seed has no fields; write --config.seed=VALUE"),
        ("--config.mesh=3", "--config.mesh: a group; set its fields one by one: data, fsdp, tensor"),
        ("--config.seed", "--config.seed: no value given; write --config.seed=VALUE"),
        ("--config.seed=-1", "--config.seed=-1: must be at least 0 and below 4294967296"),
        ("--config.mesh.data=0", "--config.mesh.data=0: give a number of devices, or -1 for all that are left"),
    ],
)
def test_a_wrong_flag_is_one_line_with_the_remedy(flag, message):
    assert fails("--config=tiny", flag) == message


def test_flags_need_a_config():
    assert fails("--config.seed=1") == "--config: no experiment given; name one, as in --config=tiny"
    assert fails("--config") == "--config: no value given; write --config=VALUE"


# -- values


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MeshConfig(tensor=-2), r"^tensor=-2: give a number"),
        (lambda: MeshConfig(data=-1, fsdp=-1), "only one axis may be -1"),
        (lambda: GenerateConfig(max_new_tokens=0), r"^max_new_tokens=0"),
        (lambda: GenerateConfig(temperature=-0.1), r"^temperature=-0\.1"),
        (lambda: GenerateConfig(top_p=0.0), r"^top_p=0\.0"),
        (lambda: GenerateConfig(top_p=1.1), r"^top_p=1\.1"),
        (lambda: GenerateConfig(repetition_penalty=0.0), r"^repetition_penalty=0\.0"),
        (lambda: Config(sharding=DEFAULT_SHARDING[1:]), "one rule for each of batch"),
        (lambda: Config(sharding=(*DEFAULT_SHARDING, ("seq", None))), "one rule for each of batch"),
        (lambda: Config(sharding=(*DEFAULT_SHARDING[1:], ("bach", None))), "one rule for each of batch"),
        (lambda: Config(sharding=(*DEFAULT_SHARDING[1:], ("batch", "date"))), "choose among the mesh axes data, fsdp"),
        (lambda: Config(sharding=(*DEFAULT_SHARDING[1:], ("batch", ("data", "data")))), "choose among the mesh axes"),
        (lambda: Config(seed=-1), "seed=-1"),
    ],
)
def test_values_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_every_group_is_frozen_and_slotted_and_every_field_documented():
    groups = [Config, *(one.type for one in dataclasses.fields(Config) if dataclasses.is_dataclass(one.type))]
    for group in groups:
        assert group.__dataclass_params__.frozen and not hasattr(group(), "__dict__")
        assert {one.name for one in dataclasses.fields(group)} <= field_docs(group).keys()


def test_the_reference_of_the_fields_is_that_of_the_code():
    written = (CONFIGS.parent / "docs/configuration.md").read_text(encoding="utf-8")
    assert written == config_table(), "write it again with the command of emollama_jax/config_table.py"
    assert "| `rank` | `int` | `64` | at least 0 | resume, prediction | Width r of the adapters; 0" in written
    assert "| `seed` | `int` | `42` | at least 0 and below 4294967296 | resume, prediction | Origin of" in written

"""Trained weights through every form, bit for bit, and into torch and PEFT."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from emollama_jax import cli
from emollama_jax.config import load_config
from emollama_jax.models.emotion_llama import PROJECTORS, EmotionLlama, is_trainable
from emollama_jax.models.lora import LoRAConfig
from emollama_jax.sharding import make_mesh
from emollama_jax.weights import base_checkpoint
from emollama_jax.weights.base_checkpoint import read_manifest
from emollama_jax.weights.emotion_llama import load_emotion_llama
from emollama_jax.weights.engine import param_values
from emollama_jax.weights.model_identity import ModelIdentity, identify_model
from emollama_jax.weights.trained import PROJECTOR_NAMES, load_trained, open_trained
from emollama_jax.weights.trained_export import write_folder as write_trained
from emollama_jax.weights.trained_export import write_pth
from tests.weights.exported import trained_tensors
from tests.weights.tiny import assert_bit_equal, assert_close, random_weights, user_error, write_folder

torch = pytest.importorskip("torch")

DATA = Path(__file__).parents[1] / "data/reference_tiny"
CHECKPOINT = DATA / "checkpoint_0.pth"
CONFIG = dataclasses.replace(load_config("tiny"), lora=LoRAConfig(rank=8, alpha=16.0))
CARRIED = ("attention.fc_out.bias", "attention.fc_out.weight")
Q1 = "llama_model.base_model.model.model.layers.1.self_attn.q_proj"
TOKENS = np.random.default_rng(0).integers(3, 640, (2, 9))


def contents(path) -> dict[str, np.ndarray]:
    """A checkpoint as torch reads it."""
    return {n: t.numpy() for n, t in torch.load(path, weights_only=True)["model"].items()}


def saved(path: Path, tensors) -> Path:
    torch.save({"model": {name: torch.tensor(np.asarray(value)) for name, value in tensors.items()}, "epoch": 3}, path)
    return path


@pytest.fixture(scope="module")
def theirs():
    return contents(CHECKPOINT)


@pytest.fixture(scope="module")
def model():
    return load_emotion_llama(DATA / "llama", CONFIG, trained=CHECKPOINT)[0]


def export(capsys, *arguments) -> str:
    assert cli.main(["export", *map(str, arguments)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def refused(capsys, *arguments) -> str:
    assert cli.main(["export", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("emollama export: error: ") and captured.err.count("\n") == 1
    assert not Path(arguments[1]).exists()
    print(captured.err)
    return captured.err


# --- there and back ---


def test_import_export_import_keeps_names_and_bits(capsys, tmp_path, theirs):
    said = export(capsys, CHECKPOINT, tmp_path / "adapter", "--to", "peft")
    assert said.splitlines() == [
        f"read    24 tensors of {CHECKPOINT}: rank 8, alpha 16, on q_proj, v_proj",
        "dropped nothing",
        f"carried {', '.join(CARRIED)}",
        f"wrote   {tmp_path / 'adapter'}: a PEFT adapter and the projectors, 24 tensors",
    ]
    export(capsys, tmp_path / "adapter", tmp_path / "again.pth", "--to", "pth")
    export(capsys, CHECKPOINT, tmp_path / "direct.pth", "--to", "pth")
    for name in ("again.pth", "direct.pth"):
        assert_bit_equal(contents(tmp_path / name), theirs)
        file = torch.load(tmp_path / name, weights_only=True)
        assert set(file) == set(torch.load(CHECKPOINT, weights_only=True))


def test_through_the_model_too(tmp_path, model, theirs):
    carried = {name: theirs[name] for name in CARRIED}
    write_pth(tmp_path / "out.pth", trained_tensors(model) | carried)
    assert_bit_equal(contents(tmp_path / "out.pth"), theirs)
    (tmp_path / "folder").mkdir()
    write_trained(tmp_path / "folder", trained_tensors(model) | carried, CONFIG.lora)
    again, _ = load_emotion_llama(DATA / "llama", CONFIG, trained=tmp_path / "folder")
    assert_bit_equal(param_values(nnx.state(again)), param_values(nnx.state(model)))


@pytest.mark.parametrize(
    "first, second", [("", "default"), ("default", ""), ("my-adapter", "default"), ("default", "my-adapter")]
)
def test_the_adapters_name_comes_and_goes(capsys, tmp_path, theirs, first, second):
    """Newer PEFT versions have it; a folder remembers it."""
    renamed = lambda name: {re.sub(r"(lora_[AB])", rf"\1.{name}", n) if name else n: v for n, v in theirs.items()}
    assert "x.lora_A.default.weight" in {re.sub(r".*q_proj", "x", n) for n in renamed("default")}
    path = saved(tmp_path / "in.pth", renamed(first))
    export(capsys, path, tmp_path / "folder", "--to", "peft")
    export(capsys, tmp_path / "folder", tmp_path / "kept.pth", "--to", "pth")
    export(capsys, tmp_path / "folder", tmp_path / "out.pth", "--to", "pth", "--adapter-name", second)
    assert_bit_equal(contents(tmp_path / "kept.pth"), renamed(first))
    assert_bit_equal(contents(tmp_path / "out.pth"), renamed(second))
    assert all(".lora_A.weight" in n for n in load_file(tmp_path / "folder/adapter_model.safetensors") if "lora_A" in n)


def test_alpha_is_said_where_it_is_not_recorded(capsys, tmp_path):
    export(capsys, CHECKPOINT, tmp_path / "folder", "--to", "peft", "--alpha", "32")
    said = export(capsys, tmp_path / "folder", tmp_path / "out.pth", "--to", "pth")
    assert "rank 8, alpha 32" in said and "24 tensors, to be read with alpha 32, which it does not record" in said
    error = refused(capsys, tmp_path / "folder", tmp_path / "again", "--to", "peft", "--alpha", "8")
    assert "--alpha 8: above 0, and only for a .pth; a folder records its own" in error


def test_half_precision_keeps_its_bits(capsys, tmp_path, theirs):
    for dtype in (torch.float16, torch.bfloat16):
        path = tmp_path / f"{dtype}.pth"
        torch.save({"model": {name: torch.tensor(value).to(dtype) for name, value in theirs.items()}}, path)
        export(capsys, path, tmp_path / f"{dtype}", "--to", "peft")
        export(capsys, tmp_path / f"{dtype}", tmp_path / f"{dtype} again.pth", "--to", "pth")
        before, after = (torch.load(p, weights_only=True)["model"] for p in (path, tmp_path / f"{dtype} again.pth"))
        assert set(before) == set(after)
        assert all(after[n].dtype == dtype and torch.equal(before[n], after[n]) for n in before)
        loaded, _ = load_emotion_llama(DATA / "llama", CONFIG, trained=path)
        assert {x.dtype for x in jax.tree.leaves(nnx.state(loaded, is_trainable))} == {jnp.dtype("float32")}


def test_what_training_saves_beside_the_model_is_dropped_by_name(tmp_path, theirs):
    file = {
        "model": {name: torch.tensor(value) for name, value in theirs.items()},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-5}]},
        "scaler": {"scale": 65536.0},
        "config": {"run": {"seed": 42}},
        "epoch": 7,
    }
    torch.save(file, tmp_path / "in.pth")
    trained = open_trained(tmp_path / "in.pth")
    assert trained.dropped == ("optimizer/state/0/exp_avg",)
    assert_bit_equal(trained.reference_tensors(), theirs)


def test_onto_a_mesh(model):
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    placed, _ = load_emotion_llama(DATA / "llama", CONFIG, trained=CHECKPOINT, mesh=mesh)
    assert len(placed.projectors.mae_proj.kernel[...].sharding.device_set) == 8
    assert placed.projectors.mae_proj.kernel[...].sharding.shard_shape((1024, 32)) == (1024, 8)
    assert_bit_equal(param_values(nnx.state(placed)), param_values(nnx.state(model)))


def test_a_base_checkpoints_files_are_compared_a_few_times(tmp_path, monkeypatch):
    """Each time costs requests where they are in an object store."""
    assert cli.main(["convert", str(DATA / "llama"), str(tmp_path / "base"), "--dtype", "float32"]) == 0
    compared, find_damage = [], base_checkpoint.find_damage
    monkeypatch.setattr(base_checkpoint, "find_damage", lambda *args: compared.append(args) or find_damage(*args))
    load_emotion_llama(tmp_path / "base", CONFIG)
    assert 1 <= len(compared) <= 4


def test_from_minigpt(tmp_path, theirs):
    """MiniGPT-v2's checkpoint has the image's projector alone; the others keep the values they have."""
    kept = {name: value for name, value in theirs.items() if name.startswith(("llama_model.", "llama_proj."))}
    path = saved(tmp_path / "minigpt.pth", kept)
    fresh = load_emotion_llama(DATA / "llama", CONFIG)[0]
    loaded, reports = load_emotion_llama(DATA / "llama", CONFIG, trained=path)
    new = {f"projectors.{name}.{leaf}" for name in PROJECTORS[1:] for leaf in ("kernel", "bias")}
    assert set(reports["trained"].initialised) == new
    before, after = (param_values(nnx.state(m, is_trainable)) for m in (fresh, loaded))
    assert {name for name in after if np.array_equal(before[name], after[name])} == new
    np.testing.assert_array_equal(loaded.projectors.image_proj.kernel[...], theirs["llama_proj.weight"].T)


# --- in torch ---


class Reference(torch.nn.Module):
    """The parts of the reference's model that a checkpoint holds, around torch's LLaMA with PEFT's adapters."""

    def __init__(self, theirs):
        super().__init__()
        peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
        llama = transformers.LlamaForCausalLM.from_pretrained(DATA / "llama", torch_dtype=torch.float32)
        settings = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"])
        self.llama_model = peft.get_peft_model(llama, settings)
        for name in PROJECTOR_NAMES:
            outputs, inputs = theirs[f"{name}.weight"].shape
            self.add_module(name, torch.nn.Linear(inputs, outputs))
        self.attention = torch.nn.Sequential()
        self.attention.add_module("fc_out", torch.nn.Linear(4, 6))


@nnx.jit
def _logits(llama, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return llama.logits(llama(llama.embed_tokens(tokens), positions, jnp.ones_like(tokens)))


def torch_logits(llama):
    with torch.no_grad():
        return llama.eval()(torch.tensor(TOKENS)).logits.float().numpy()


def test_the_reference_loads_our_checkpoint(capsys, tmp_path, theirs, model):
    export(capsys, CHECKPOINT, tmp_path / "out.pth", "--to", "pth", "--adapter-name", "default")
    reference = Reference(theirs)
    found = reference.load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True)["model"], strict=False)
    assert found.unexpected_keys == []
    trained = {name for name, p in reference.named_parameters() if "lora_" in name or "llama_model" not in name}
    assert trained.isdisjoint(found.missing_keys) and len(trained) == len(theirs)
    assert_close(np.asarray(_logits(model.llama, jnp.asarray(TOKENS))), torch_logits(reference.llama_model))
    features = np.random.default_rng(0).normal(size=(2, 3, 1024)).astype(np.float32)
    ours = model.projectors.hubert_proj(jnp.asarray(features[:, 2]))
    with torch.no_grad():
        assert_close(np.asarray(ours), reference.feats_llama_proj3(torch.tensor(features[:, 2])).numpy())


def test_peft_loads_our_folder(capsys, tmp_path, model):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    export(capsys, CHECKPOINT, tmp_path / "adapter", "--to", "peft")
    llama = transformers.LlamaForCausalLM.from_pretrained(DATA / "llama", torch_dtype=torch.float32)
    plain = torch_logits(llama)
    adapted = peft.PeftModel.from_pretrained(llama, str(tmp_path / "adapter"))
    assert np.abs(torch_logits(adapted) - plain).max() > 0.1
    assert_close(np.asarray(_logits(model.llama, jnp.asarray(TOKENS))), torch_logits(adapted))


def test_torch_loads_the_merged_model(capsys, tmp_path, model, theirs):
    transformers = pytest.importorskip("transformers")
    said = export(capsys, CHECKPOINT, tmp_path / "merged", "--to", "hf", "--base", DATA / "llama", "--dtype", "float32")
    assert "with the adapters added, a Hugging Face folder in float32" in said
    llama = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert llama.config.max_position_embeddings == 4096
    assert (tmp_path / "merged/generation_config.json").is_file()
    assert_close(np.asarray(_logits(model.llama, jnp.asarray(TOKENS))), torch_logits(llama))
    projectors = {name: value for name, value in theirs.items() if not name.startswith("llama_model.")}
    assert_bit_equal(load_file(tmp_path / "merged/projectors.safetensors"), projectors)


# --- refusals ---


def without(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


LORA_A = "llama_model.base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without("llama_proj.bias"), ["1 missing: llama_proj.bias"]),
        (without("feats_llama_proj2.weight", "cls_tk_llama_proj.bias"), ["2 missing", "feats_llama_proj2.weight"]),
        (without(LORA_A), ["1 missing", LORA_A]),
        (lambda t: t.update({"llama_proj.weight": np.zeros((32, 191), np.float32)}), ["[32, 191], not [32, 192]"]),
        (lambda t: t.update({"feats_llama_proj4.bias": np.zeros(3)}), ["1 unknown tensors: feats_llama_proj4.bias"]),
        (lambda t: t.update({LORA_A: np.full((8, 32), np.nan, np.float32)}), ["NaN", "llama_model"]),
        (lambda t: t.update({LORA_A: np.zeros((4, 32), np.float32)}), ["adapters of the ranks [4, 8]"]),
        (lambda t: t.update({LORA_A.replace(".weight", ".b.weight"): t.pop(LORA_A)}), ["several adapters, , b"]),
        (lambda t: [t.pop(n) for n in list(t) if "lora" in n], ["no LoRA adapters in this file"]),
    ],
    ids=["bias", "two", "adapter", "shape", "unknown", "nan", "ranks", "named", "none"],
)
def test_incomplete_checkpoints_are_named_in_full(tmp_path, theirs, spoil, words):
    tensors = dict(theirs)
    spoil(tensors)
    path = saved(tmp_path / "bad.pth", tensors)
    with user_error(*words, str(path)):
        load_emotion_llama(DATA / "llama", CONFIG, trained=path)


def test_other_adapters_than_the_configs(tmp_path):
    other = dataclasses.replace(CONFIG, lora=LoRAConfig(rank=8, alpha=16.0, targets=("q_proj",)))
    with user_error("the adapters are on q_proj, v_proj with scale 2, the model's on q_proj", str(CHECKPOINT)):
        load_emotion_llama(DATA / "llama", other, trained=CHECKPOINT)


def test_another_language_model_than_the_configs():
    other = dataclasses.replace(CONFIG, llama=dataclasses.replace(CONFIG.llama, num_layers=2, rope_theta=5e3))
    with user_error("has num_layers=3, rope_theta=10000.0, the config llama: num_layers=2, rope_theta=5000.0"):
        load_emotion_llama(DATA / "llama", other)


def test_a_pickle_that_would_run_something(capsys, tmp_path):
    class Bad:
        def __reduce__(self):
            return print, ("executed",)

    torch.save({"model": {"x": Bad()}}, tmp_path / "bad.pth")
    assert "refused, nothing was executed" in refused(capsys, tmp_path / "bad.pth", tmp_path / "out", "--to", "peft")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--to", "hf"], "--base: --to hf needs the language model that the adapters are added to"),
        (["--to", "pth", "--base", "x"], "--base: not with --to pth"),
        (["--to", "peft", "--adapter-name", "x"], "--adapter-name: only for --to pth"),
        (["--to", "pth", "--adapter-name", "a.b"], "--adapter-name a.b: a name has no dots"),
        (["--to", "peft", "--alpha", "0"], "--alpha 0: above 0, and only for a .pth"),
        (["--to", "hf", "--base", "nowhere"], "no such file or folder: nowhere"),
    ],
    ids=["no base", "base", "name", "dots", "alpha", "nowhere"],
)
def test_arguments_that_make_no_sense(capsys, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, CHECKPOINT, "out", *arguments)


def test_wrong_inputs(capsys, tmp_path):
    out = tmp_path / "out"
    assert "no such file or folder" in refused(capsys, tmp_path / "none.pth", out, "--to", "peft")
    assert "no adapter_config.json" in refused(capsys, DATA / "llama", out, "--to", "peft")
    export(capsys, CHECKPOINT, tmp_path / "adapter", "--to", "peft")
    (tmp_path / "adapter/projectors.safetensors").unlink()
    assert "no projectors.safetensors" in refused(capsys, tmp_path / "adapter", out, "--to", "pth")


def test_existing_outputs_are_left_alone(capsys, tmp_path):
    for form in ("pth", "peft"):
        (tmp_path / form).write_text("precious")
        assert cli.main(["export", str(CHECKPOINT), str(tmp_path / form), "--to", form]) == 2
        assert "exists already" in capsys.readouterr().err
        assert (tmp_path / form).read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["peft", "pth"]


def test_a_folder_of_peft_records_the_settings(tmp_path, theirs):
    trained = open_trained(CHECKPOINT, alpha=32.0)
    (tmp_path / "a").mkdir()
    write_trained(tmp_path / "a", trained.reference_tensors(), trained.lora, base="weights/llama2")
    settings = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["base_model_name_or_path"]) == (8, 32.0, "weights/llama2")
    assert open_trained(tmp_path / "a").lora == trained.lora


def test_peft_finds_the_base_of_an_export(capsys, tmp_path, theirs):
    peft = pytest.importorskip("peft")
    said = export(capsys, CHECKPOINT, tmp_path / "a", "--to", "peft", "--base", DATA / "llama")
    assert f"a PEFT adapter of {DATA / 'llama'} and the projectors" in said
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a").state_dict()
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A"
    np.testing.assert_array_equal(loaded[f"{name}.default.weight"].float(), theirs[f"llama_model.{name}.weight"])
    assert f"of {DATA / 'llama'}" in export(capsys, tmp_path / "a", tmp_path / "b", "--to", "peft")
    assert "of a/name and" in export(capsys, tmp_path / "a", tmp_path / "c", "--to", "peft", "--base", "a/name")


def test_an_export_goes_on_the_language_model_that_it_is_of(capsys, tmp_path):
    """In every form that is read again: to be exported or added to a model; until it is told to name none."""
    other = write_folder(tmp_path / "other", CONFIG.llama, random_weights(CONFIG.llama, seed=1))
    peft, pth = tmp_path / "peft", tmp_path / "x.pth"
    export(capsys, CHECKPOINT, peft, "--to", "peft", "--base", DATA / "llama")
    export(capsys, peft, pth, "--to", "pth")
    export(capsys, pth, tmp_path / "again", "--to", "peft")
    known = identify_model(DATA / "llama")
    for form in (peft, pth, tmp_path / "again"):
        trained = open_trained(form)
        assert (trained.base, trained.base_identity) == (str(DATA / "llama"), known) and known
        said = refused(capsys, form, tmp_path / "out", "--to", "hf", "--base", other)
        assert f"{form} was trained on the language model {DATA / 'llama'}, and {other} is another" in said
        assert "--any-base" in said
    assert "is another" in refused(capsys, peft, tmp_path / "out", "--to", "peft", "--base", other)
    export(capsys, peft, tmp_path / "moved", "--to", "peft", "--base", other, "--any-base")
    assert open_trained(tmp_path / "moved").base_identity == identify_model(other)
    convert = ["convert", str(other), str(tmp_path / "merged"), "--adapter", str(peft)]
    assert cli.main(convert) == 2
    assert "is another" in (said := capsys.readouterr().err) and said.count("\n") == 1
    assert cli.main([*convert, "--any-base"]) == 0
    assert read_manifest(tmp_path / "merged")["origin"] == ""
    export(capsys, peft, tmp_path / "free", "--to", "peft", "--any-base")
    free = open_trained(tmp_path / "free")
    assert (free.base, free.base_identity) == ("", ModelIdentity())


def test_the_export_of_a_run_names_the_model_that_its_base_was_made_of(capsys, tmp_path):
    """By the path that PEFT loads it from; not where an adapter was added to it."""
    base, merged, peft = tmp_path / "base", tmp_path / "merged", tmp_path / "peft"
    assert cli.main(["convert", str(DATA / "llama"), str(base)]) == 0
    capsys.readouterr()
    export(capsys, CHECKPOINT, peft, "--to", "peft", "--base", base)
    trained = open_trained(peft)
    assert (trained.base, trained.base_identity) == (str(DATA / "llama"), identify_model(base))
    assert cli.main(["convert", str(DATA / "llama"), str(merged), "--adapter", str(peft)]) == 0
    capsys.readouterr()
    said = refused(capsys, CHECKPOINT, tmp_path / "out", "--to", "peft", "--base", merged)
    assert "PEFT cannot load a base checkpoint" in said


def test_trained_weights_go_into_any_model_that_has_their_adapters(theirs):
    model = EmotionLlama.init(CONFIG.llama, CONFIG.lora, CONFIG.projectors, CONFIG.eva_vit, rngs=nnx.Rngs(1))
    report = load_trained(model, open_trained(CHECKPOINT))
    assert len(report.read) == len(theirs) - len(CARRIED)
    assert report.dropped == CARRIED
    assert_bit_equal(trained_tensors(model), {n: v for n, v in theirs.items() if n not in CARRIED})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda name, x: {} if name == f"{Q1}.lora_B.weight" else {name: x}, f"no {Q1}.lora_B.weight"),
        (lambda name, x: {} if ".layers.1." in name else {name: x}, f"no {Q1}.lora_A.weight"),
        (lambda name, x: {} if name == "feats_llama_proj2.bias" else {name: x}, "no feats_llama_proj2.bias"),
        (lambda name, x: {name: x[:-1] if name == "llama_proj.bias" else x}, "llama_proj.weight (32, 192) beside"),
        (lambda name, x: {name: x[:, :-1] if name == f"{Q1}.lora_A.weight" else x}, "lora_A.weight of the shapes"),
        (lambda name, x: {name: x[:, :-1] if name.endswith("lora_B.weight") else x}, "lora_B.weight of the shapes"),
        (lambda name, x: {name: x * np.nan if name == "attention.fc_out.bias" else x}, "holds NaN or infinity"),
        (lambda name, x: {name: x.astype(np.int8) if name == "llama_proj.weight" else x}, "holds int8 numbers"),
    ],
    ids=["matrix", "layer", "bias", "bias's shape", "A's shape", "rank", "nan", "integers"],
)
@pytest.mark.parametrize("form", ["pth", "peft"])
def test_what_is_not_whole_is_not_exported(capsys, tmp_path, theirs, change, words, form):
    """Without a model to compare with: the tensors of a file against each other."""
    tensors = {new: y for name, x in theirs.items() for new, y in change(name, x).items()}
    tensors = {name: torch.tensor(value) for name, value in tensors.items()}
    torch.save({"model": tensors}, tmp_path / "in.pth")
    assert words in refused(capsys, tmp_path / "in.pth", tmp_path / "out", "--to", form)

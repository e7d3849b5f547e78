"""`emollama convert` from every format, through a base checkpoint, to a Hugging Face folder; and what it refuses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from emollama_jax import cli
from emollama_jax.cli import convert
from emollama_jax.models.lora import LoRAConfig, adapters
from emollama_jax.weights.base_checkpoint import read_manifest
from emollama_jax.weights.model_identity import identify_model
from emollama_jax.weights.peft import save_adapter
from emollama_jax.weights.pretrained import load_base_tokenizer, load_llama
from tests.weights.tiny import (
    FLOAT32,
    REFERENCE,
    assert_bit_equal,
    random_weights,
    stored_values,
    tiny_config,
    write_folder,
    write_gguf,
)

CONFIG = tiny_config(num_layers=2)
WEIGHTS = random_weights(CONFIG)
F32 = ("--dtype", "float32")
LORA = LoRAConfig(rank=4, alpha=6.0)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with the same model as `hf`, `tiny.gguf`, `base` (int8) and `adapter`; tests only read them."""
    where = tmp_path_factory.mktemp("files")
    write_folder(where / "hf", CONFIG, WEIGHTS)
    write_gguf(where / "tiny.gguf", CONFIG, WEIGHTS)
    model, _ = load_llama(where / "hf", lora=LORA, **FLOAT32)
    for number, (_, layer) in enumerate(adapters(model)):
        layer.lora_b[...] = np.random.default_rng(number).normal(0, 0.1, layer.lora_b.shape).astype(np.float32)
    (where / "adapter").mkdir()
    save_adapter(where / "adapter", model)
    assert cli.main(["convert", f"{where / 'hf'}", f"{where / 'base'}", "--kernel-dtype", "int8", *F32]) == 0
    return where


def test_a_base_checkpoint_is_known_as_the_model_it_was_made_of(files, tmp_path):
    """In whatever storage, and again from a base checkpoint; with an adapter added it is another."""
    ours = identify_model(files / "base")
    assert ours.may_be(identify_model(files / "hf")) and ours.fingerprint
    others = write_folder(tmp_path / "other", CONFIG, random_weights(CONFIG, seed=1))
    assert not ours.may_be(identify_model(others)) and not ours.may_be(identify_model(files / "tiny.gguf"))
    made = lambda name, *argv: cli.main(["convert", *map(str, argv), str(tmp_path / name), *F32]) == 0
    assert made("float32", files / "hf") and made("again", tmp_path / "float32")
    assert identify_model(tmp_path / "again").may_be(ours)
    assert made("merged", files / "hf", "--adapter", files / "adapter")
    assert not identify_model(tmp_path / "merged").may_be(ours)


def run(capsys, *arguments: str | Path) -> str:
    """What a conversion that succeeds prints."""
    code = cli.main(["convert", *map(str, arguments)])
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, "")
    return captured.out


def refused(capsys, *arguments: str | Path) -> str:
    """The one line of error of a conversion that fails, and leaves nothing beside its output."""
    output = Path(arguments[1])
    before = {path: path.stat().st_mtime_ns for path in output.parent.rglob("*")}
    assert cli.main(["convert", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("emollama convert: error: ")
    assert captured.err.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in output.parent.rglob("*")} == before
    print(captured.err)
    return captured.err


def tensors(folder):
    return load_file(folder / "model.safetensors")


# --- conversions ---


@pytest.mark.smoke
def test_every_road_to_a_hugging_face_folder_keeps_every_bit(capsys, files, tmp_path):
    """hf or gguf -> base -> hf, and gguf -> hf at once."""
    prints = set()
    for source in ("hf", "tiny.gguf"):
        base, out = tmp_path / f"base {source}", tmp_path / f"hf {source}"
        said = run(capsys, files / source, base, *F32)
        assert f"read    {len(WEIGHTS)} {'gguf' if source == 'tiny.gguf' else 'safetensors'} tensors" in said
        assert "dropped nothing\n" in said
        assert f"wrote   {base}: a base checkpoint with float32 kernels" in said
        prints.add(re.search(r"fingerprint (sha256:\w{64})\n", said)[1])
        assert read_manifest(base)["source"] == str(files / source)
        said = run(capsys, base, out, "--to", "hf", *F32)
        assert f"wrote   {out}: a Hugging Face folder in float32\n" in said
        assert_bit_equal(tensors(out), WEIGHTS)
        assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float32"
        ids = [load_base_tokenizer(folder, 640).encode("She smiles.</s>") for folder in (base, out, REFERENCE)]
        assert ids[0] == ids[1] == ids[2]
    run(capsys, files / "tiny.gguf", tmp_path / "at once", "--to=hf", *F32)
    assert_bit_equal(tensors(tmp_path / "at once"), WEIGHTS)
    assert len(prints) == 1
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_bfloat16_is_the_default(capsys, files, tmp_path):
    run(capsys, files / "hf", tmp_path / "base")
    config = read_manifest(tmp_path / "base")["llama"]
    assert (config.kernel_dtype, config.param_dtype) == ("bfloat16", "bfloat16")
    run(capsys, tmp_path / "base", tmp_path / "hf", "--to", "hf")
    expected = {name: value.astype(ml_dtypes.bfloat16) for name, value in WEIGHTS.items()}
    assert_bit_equal(tensors(tmp_path / "hf"), expected)


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_quantised_base(capsys, files, tmp_path, dtype):
    """As the model quantises itself when it is loaded; dequantised on the way out, and what is float keeps its bits."""
    said = run(capsys, files / "tiny.gguf", tmp_path / "base", "--kernel-dtype", dtype, *F32)
    assert f"a base checkpoint with {dtype} kernels" in said
    loaded, _ = load_llama(files / "hf", **(FLOAT32 | {"kernel_dtype": dtype}))
    assert_bit_equal(stored_values(load_llama(tmp_path / "base")[0]), stored_values(loaded))
    run(capsys, tmp_path / "base", tmp_path / "hf", "--to", "hf", *F32)
    for name, value in tensors(tmp_path / "hf").items():
        if "_proj" in name:
            assert 0 < np.max(np.abs(value - WEIGHTS[name])) < 0.17 * np.max(np.abs(WEIGHTS[name])), name
        else:
            np.testing.assert_array_equal(value, WEIGHTS[name], err_msg=name)


def test_adapter_is_merged(capsys, files, tmp_path):
    delta = load_file(files / "adapter/adapter_model.safetensors")
    expected = {name: value.astype(np.float64) for name, value in WEIGHTS.items()}
    for name in delta:
        if name.endswith(".lora_A.weight"):
            a, b = (delta[name.replace("lora_A", x)].astype(np.float64) for x in ("lora_A", "lora_B"))
            expected[name.removeprefix("base_model.model.").replace(".lora_A", "")] += 6 / 4 * b @ a
    said = run(capsys, files / "hf", tmp_path / "hf", "--to", "hf", "--adapter", files / "adapter", *F32)
    assert f"added   8 adapter tensors of {files / 'adapter'}\n" in said
    run(capsys, files / "tiny.gguf", tmp_path / "base", "--adapter", files / "adapter", *F32)
    run(capsys, tmp_path / "base", tmp_path / "from base", "--to", "hf", *F32)
    for folder in ("hf", "from base"):
        found = tensors(tmp_path / folder)
        assert set(found) == set(WEIGHTS)
        changed = {name for name in found if not np.array_equal(found[name], WEIGHTS[name])}
        assert changed == {name for name in WEIGHTS if "q_proj" in name or "v_proj" in name}
        for name, value in found.items():
            np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-6, err_msg=name)
    assert not (tmp_path / "hf/adapter_config.json").exists()


def test_adapter_on_a_quantised_base(capsys, files, tmp_path):
    """Into a float folder it can go: the sum is not rounded to the kernels' few steps again."""
    run(capsys, files / "base", tmp_path / "plain", "--to", "hf", *F32)
    run(capsys, files / "base", tmp_path / "merged", "--to", "hf", "--adapter", files / "adapter", *F32)
    plain, merged = tensors(tmp_path / "plain"), tensors(tmp_path / "merged")
    delta = load_file(files / "adapter/adapter_model.safetensors")
    name = "model.layers.1.self_attn.v_proj"
    b, a = (delta[f"base_model.model.{name}.lora_{x}.weight"] for x in "BA")
    np.testing.assert_allclose(merged[f"{name}.weight"] - plain[f"{name}.weight"], 1.5 * b @ a, rtol=0, atol=1e-6)


def test_base_to_base(capsys, files, tmp_path):
    run(capsys, files / "base", tmp_path / "again", "--kernel-dtype", "int8", *F32)
    assert read_manifest(tmp_path / "again")["fingerprint"] == read_manifest(files / "base")["fingerprint"]


def test_output_in_new_folders(capsys, files, tmp_path):
    run(capsys, files / "hf", tmp_path / "a/b/c", "--to", "hf", *F32)
    assert_bit_equal(tensors(tmp_path / "a/b/c"), WEIGHTS)


def test_as_a_command(files, tmp_path):
    """In a process of its own, as users run it, also where JAX would look for an accelerator."""
    command = [sys.executable, "-m", "emollama_jax", "convert", files / "tiny.gguf", "out", "--to", "hf", *F32]
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    environment["PYTHONPATH"] = str(Path(cli.__file__).parents[2])
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "wrote   out: a Hugging Face folder in float32"
    assert_bit_equal(tensors(tmp_path / "out"), WEIGHTS)


# --- refusals ---


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
@pytest.mark.parametrize("more", [["--to", "hf"], ["--adapter", "adapter"]])
def test_quantising_what_is_merged_or_for_torch(capsys, files, tmp_path, dtype, more):
    error = refused(capsys, files / "hf", tmp_path / "out", "--kernel-dtype", dtype, *more)
    assert f"--kernel-dtype {dtype}: neither with --to hf nor with --adapter; write the merged model" in error


@pytest.mark.parametrize("arguments", [[], ["in"], ["in", "out", "--to", "gguf"], ["in", "out", "--dtype", "int8"]])
def test_wrong_arguments(capsys, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["convert", *arguments]) == 2
    error = capsys.readouterr().err
    assert "emollama convert --help lists the arguments" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_existing_output_is_refused_and_untouched(capsys, files, tmp_path, kind):
    output = tmp_path / "out"
    if kind == "folder":
        output.mkdir()
    kept = output / "keep" if kind == "folder" else output
    kept.write_text("precious")
    error = refused(capsys, files / "hf", output)
    assert f"exists already: {output}; remove it or choose another folder" in error
    assert kept.read_text() == "precious"


def test_the_input_is_never_the_output(capsys, files):
    assert "exists already" in refused(capsys, files / "hf", files / "hf", "--to", "hf")
    assert_bit_equal(tensors(files / "hf"), WEIGHTS)


def test_an_interrupt_leaves_nothing(capsys, files, tmp_path, monkeypatch):
    def interrupt(folder, *arguments, **kwargs):
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "save_hugging_face", interrupt)
    assert cli.main(["convert", str(files / "hf"), str(tmp_path / "out"), "--to", "hf"]) == 130
    assert not list(tmp_path.iterdir())


def spoil(change):
    """A Hugging Face folder whose tensors a function changed, in place or into others."""

    def make(folder):
        weights = dict(WEIGHTS)
        change(weights)
        return write_folder(folder, CONFIG, weights)

    return make


def spoil_settings(**settings):
    return lambda folder: write_folder(folder, CONFIG, WEIGHTS, **settings)


def without(name):
    def make(folder):
        (write_folder(folder, CONFIG, WEIGHTS) / name).unlink()
        return folder

    return make


def truncated(folder):
    file = write_folder(folder, CONFIG, WEIGHTS) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return folder


def truncated_gguf(folder):
    folder.mkdir()
    write_gguf(folder / "tiny.gguf", CONFIG, WEIGHTS)
    content = (folder / "tiny.gguf").read_bytes()
    (folder / "tiny.gguf").write_bytes(content[: len(content) // 2])
    return folder / "tiny.gguf"


def unknown_quantisation(folder):
    """One whose number the gguf package does not have."""
    folder.mkdir()
    file = folder / "tiny.gguf"
    write_gguf(file, CONFIG, WEIGHTS)
    content = bytearray(file.read_bytes())
    name = b"blk.0.attn_q.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8
    content[at : at + 4] = (250).to_bytes(4, "little")
    file.write_bytes(content)
    return file


def small_vocabulary(folder):
    config = tiny_config(num_layers=1, vocab_size=639)
    return write_folder(folder, config, random_weights(config))


def nan(weights):
    weights["model.norm.weight"] = np.full_like(weights["model.norm.weight"], np.nan)


def four_faults(weights):
    del weights["model.norm.weight"]
    weights["extra"] = np.zeros(3, np.float32)
    weights["lm_head.weight"] = weights["lm_head.weight"][:5]
    weights["model.layers.0.mlp.gate.weight"] = weights.pop("model.layers.0.mlp.gate_proj.weight")


FAULTS = {
    "nothing there": (lambda folder: folder, ["no such file or folder", "check the path"]),
    "empty folder": (lambda folder: folder.mkdir() or folder, ["no weights in this folder"]),
    "architecture": (spoil_settings(model_type="mistral"), ["a mistral, not a llama", "only LLaMA"]),
    "biases": (spoil_settings(attention_bias=True), ["has biases", "only LLaMA"]),
    "scaled rope": (spoil_settings(rope_scaling={"rope_type": "llama3"}), ["scaled rotary positions", "only LLaMA"]),
    "no config.json": (without("config.json"), ["no config.json", "copy it"]),
    "missing key": (spoil_settings(intermediate_size=None), ["lacks 'intermediate_size'"]),
    "no tokenizer": (without("tokenizer.model"), ["tokenizer.model"]),
    "nan": (spoil(nan), ["model.norm.weight holds NaN", "again"]),
    "truncated": (truncated, ["model.safetensors", "again"]),
    "truncated gguf": (truncated_gguf, ["tiny.gguf", "again"]),
    "quantisation": (unknown_quantisation, ["tiny.gguf", "use another one, e.g. Q8_0"]),
    "vocabulary": (small_vocabulary, ["640 ids", "639", "use the tokenizer"]),
    "four faults": (
        spoil(four_faults),
        ["extra", "model.norm.weight", "lm_head.weight is [5, 64], not [640, 64]", "mlp.gate.weight"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_input_is_one_line_and_leaves_nothing(capsys, tmp_path, fault):
    make, words = FAULTS[fault]
    path = make(tmp_path / "in")
    error = refused(capsys, path, tmp_path / "out")
    for word in [str(tmp_path / "in"), *words]:
        assert word in error


@pytest.mark.parametrize("fault", ["architecture", "no tokenizer", "vocabulary"])
def test_what_is_small_is_checked_before_the_weights_are_read(capsys, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(convert, "load_llama", None)
    make, words = FAULTS[fault]
    assert words[0] in refused(capsys, make(tmp_path / "in"), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), ["no adapter_config.json"]),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), ["no weights in this folder"]),
        (lambda folder: settings(folder, use_dora=True), ["use_dora=True", "only plain LoRA", "merge_and_unload"]),
        (lambda folder: settings(folder, target_modules=["q_proj"]), ["4 unknown", "v_proj"]),
        (lambda folder: settings(folder, target_modules=["k_proj", "q_proj"]), ["4 missing", "4 unknown"]),
        (lambda folder: settings(folder, r=8), ["of the wrong shape"]),
    ],
)
def test_a_faulty_adapter_is_one_line_and_leaves_nothing(capsys, files, tmp_path, change, words):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in (files / "adapter").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    change(folder)
    error = refused(capsys, files / "hf", tmp_path / "out", "--to", "hf", "--adapter", folder, *F32)
    for word in [str(folder), *words]:
        assert word in error


def settings(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("arguments", [[], ["--kernel-dtype", "nf4"], ["--adapter", "adapter"]])
def test_a_quantised_base_stays_what_it_is(capsys, files, tmp_path, arguments):
    arguments = [files / "adapter" if argument == "adapter" else argument for argument in arguments]
    error = refused(capsys, files / "base", tmp_path / "out", *arguments)
    assert "the base checkpoint holds int8 kernels, not" in error
    assert "convert the original weights" in error


def test_help(capsys):
    assert cli.main(["convert", "--help"]) == 0
    assert "usage: emollama convert" in capsys.readouterr().out

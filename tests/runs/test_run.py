"""Runs, opened: which checkpoint is taken, how much is read, what older ones say, and what they are asked about."""

import dataclasses
import json
import shutil
from pathlib import Path

import grain
import jax
import numpy as np
import pytest
from flax import nnx

from emollama_jax.config import load_config, to_dict
from emollama_jax.errors import UserError
from emollama_jax.features.encoders import Encoders
from emollama_jax.io.checksums import bytes_read
from emollama_jax.io.file_list import write_file_list
from emollama_jax.io.orbax_arrays import read_arrays, save_arrays
from emollama_jax.models.emotion_llama import EmotionLlama, is_trainable
from emollama_jax.models.eva_vit import EvaVit
from emollama_jax.models.lora import LoRAConfig
from emollama_jax.runs.checkpoints import Checkpoints
from emollama_jax.runs.identity import file_fingerprint
from emollama_jax.runs.run import Run
from emollama_jax.train.optimizer import make_optimizer
from emollama_jax.train.step import init_state
from emollama_jax.weights.engine import param_values
from emollama_jax.weights.model_identity import ModelIdentity, check_base
from emollama_jax.weights.trained import load_trained
from tests.train.runs import write_meta

CONFIG = dataclasses.replace(load_config("tiny"), lora=LoRAConfig(rank=64))
META = {"carried": ["attention.fc_out.bias"], "adapter_name": "default", "encoders": {"mae": "m"}, "frame_rules": None}


def make_model(seed: int) -> EmotionLlama:
    parts = (CONFIG.llama, CONFIG.lora, CONFIG.projectors, CONFIG.eva_vit)
    return EmotionLlama.init(*parts, with_encoder=False, rngs=nnx.Rngs(seed))


def trained_values(model: EmotionLlama) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in param_values(nnx.state(model, is_trainable)).items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of the checkpoints 1, 2 and 3, of which each holds the values of a model of that seed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with Checkpoints(folder, keep=3) as checkpoints:
        fixed = checkpoints.save_fixed({"attention.fc_out.bias": np.arange(3.0)})
        for step in (1, 2, 3):
            _, _, state = init_state(make_model(step), make_optimizer(CONFIG.train))
            rng = np.random.default_rng(step)  # zeros would be compressed away
            noise = lambda x: jax.numpy.asarray(rng.normal(size=x.shape), x.dtype) if x.ndim else x  # noqa: B023
            state = dataclasses.replace(state, opt_state=jax.tree.map(noise, state.opt_state))
            iterator = iter(grain.MapDataset.range(9).to_iter_dataset())
            checkpoints.save(step, state, iterator, {**META, "config": to_dict(CONFIG), "fixed": fixed})
    return folder


@pytest.fixture
def run(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "run"))


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def bytes_from_files() -> int:
    """What this process has read so far by system calls, from files or elsewhere."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"])


def test_the_newest_checkpoint_goes_into_a_model(run):
    opened = Run.open(run)
    assert (opened.step, opened.config, opened.adapter_name) == (3, CONFIG, "default")
    assert opened.config_for_inference().mesh == type(CONFIG.mesh)()
    assert opened.provenance.encoders == {"mae": "m"} and opened.provenance.labels == CONFIG.prompt.labels
    np.testing.assert_array_equal(opened.carried()["attention.fc_out.bias"], np.arange(3.0))
    model, expected = make_model(0), trained_values(make_model(3))
    report = load_trained(model, opened.trained_weights())
    assert set(report.read) == set(expected) == set(opened.values()) and report.dropped == ("attention.fc_out.bias",)
    for name, value in trained_values(model).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    assert Run.open(run / "checkpoints/2").step == 2


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts reads as Linux does")
def test_opening_and_loading_read_less_than_one_checkpoint(run):
    checkpoint = run / "checkpoints/3"
    Run.open(run / "checkpoints/1").trained_weights()  # reads modules, too
    hashed, read = bytes_read(), bytes_from_files()
    opened = Run.open(run)
    opened.trained_weights()
    Run.open(run)
    assert bytes_read() - hashed == size_of(checkpoint / "params") + size_of(checkpoint / "meta")
    assert size_of(checkpoint / "params") < bytes_from_files() - read < size_of(checkpoint)


def flip(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(bytes([data[0] ^ 1]) + data[1:])


def test_unfinished_and_damaged_checkpoints_are_skipped_and_named(run):
    (run / "checkpoints/3/files.json").unlink()
    flip(run / "checkpoints/2/params/manifest.ocdbt")
    said = []
    assert Run.open(run, log=said.append).step == 1
    assert [message.partition(":")[0] for message in said] == [
        "checkpoint of step 3 is not finished (no files.json)",
        "checkpoint of step 2 is damaged (params/manifest.ocdbt is not what was written)",
    ]
    with pytest.raises(
        UserError, match=r"damaged \(params/manifest.ocdbt is not what was written\): .*/2; name another"
    ):
        Run.open(run / "checkpoints/2")
    flip(run / "checkpoints/1/meta/metadata")
    with pytest.raises(UserError, match="no sound checkpoint: "):
        Run.open(run, log=said.append)


def test_the_optimisers_arrays_are_compared_by_size_alone(run):
    file = run / "checkpoints/3/opt_state/manifest.ocdbt"
    flip(file)
    assert Run.open(run).step == 3  # a resumed run sees it: tests/runs/test_checkpoints.py
    file.write_bytes(b"")
    assert Run.open(run, log=lambda message: None).step == 2


def test_damage_to_fixed_arrays_is_seen_and_loses_no_checkpoint(run, tmp_path):
    """One bit of every file, a file that is missing, no folder, and the folder of another run."""
    whole = Path(shutil.copytree(run / "fixed", tmp_path / "whole"))

    def spoil(how):
        shutil.rmtree(run / "fixed", ignore_errors=True)
        shutil.copytree(whole, run / "fixed")
        how()

    files = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file() and path.stat().st_size]
    ways = {f"{name} flipped": lambda name=name: flip(run / "fixed" / name) for name in files}
    ways |= {f"{name} gone": lambda name=name: (run / "fixed" / name).unlink() for name in files}

    def replace():
        shutil.rmtree(run / "fixed")
        with Checkpoints(tmp_path / "other", keep=2) as checkpoints:
            checkpoints.save_fixed({"attention.fc_out.bias": np.ones(3)})
        shutil.copytree(tmp_path / "other/fixed", run / "fixed")

    ways |= {"gone": lambda: shutil.rmtree(run / "fixed"), "another run's": replace}
    for how, act in ways.items():
        spoil(act)
        with pytest.raises(UserError, match="what the run does not train is .*fixed; copy it again") as caught:
            Run.open(run).trained_weights()
        assert "\n" not in str(caught.value), how
        with Checkpoints(run, keep=3) as checkpoints, pytest.raises(UserError, match="what the run does not train is"):
            assert checkpoints.newest == 3
            checkpoints.restore_fixed({"x": jax.numpy.zeros(3)}, checkpoints.open_newest().meta["fixed"])
    spoil(lambda: None)
    np.testing.assert_array_equal(Run.open(run).carried()["attention.fc_out.bias"], np.arange(3.0))


def test_trained_values_win_over_those_of_another_run_in_the_folder(run):
    """Older runs do not say whether what lies beside them is theirs."""
    values = {name: np.zeros_like(value) for name, value in trained_values(make_model(3)).items()}
    shutil.rmtree(run / "fixed")
    save_arrays(run / "fixed", values)
    for digest in ({}, {"fixed": ""}):
        meta = {name: value for name, value in Run.open(run).meta.items() if name != "fixed"}
        (run / "checkpoints/3/meta/metadata").write_text(json.dumps(meta | digest))
        write_file_list(run / "checkpoints/3")
        for name, value in trained_values(make_model(3)).items():
            np.testing.assert_array_equal(Run.open(run).values()[name], value, err_msg=name)


def test_a_new_run_clears_the_fixed_values_of_another(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        one = checkpoints.save_fixed({"a": np.ones(2)})
        two = checkpoints.save_fixed({"a": np.zeros(2)})
        assert one != two and checkpoints.save_fixed({}) == ""
        assert not (tmp_path / "fixed").exists()


def test_an_older_run_is_opened_and_resumed(run):
    """One folder for all arrays, and other names in what it says."""
    checkpoint = run / "checkpoints/3"
    arrays = read_arrays(checkpoint / "params") | read_arrays(checkpoint / "opt_state")
    for part in ("params", "opt_state"):
        shutil.rmtree(checkpoint / part)
    save_arrays(checkpoint / "state", {name: jax.numpy.asarray(value) for name, value in arrays.items()})
    meta = json.loads((checkpoint / "meta/metadata").read_text())
    del meta["frame_rules"]
    old = {"frames": ["peak"], "shares": 2, "encoder": {"eva_vit": "ab", "ln_vision": ""}}
    (checkpoint / "meta/metadata").write_text(json.dumps(meta | old))
    write_file_list(checkpoint)
    opened = Run.open(run)
    assert opened.provenance.frame_rules == ("peak",) and opened.meta["num_shards"] == 2
    assert opened.provenance.encoders == {"mae": "m", "eva_vit": "file:ab"}
    for name, value in trained_values(make_model(3)).items():
        np.testing.assert_array_equal(opened.values()[name], value, err_msg=name)
    _, _, state = init_state(make_model(0), make_optimizer(CONFIG.train))
    with Checkpoints(run, keep=3) as checkpoints:
        assert checkpoints.open_newest().step == 3
        found = checkpoints.restore(3, state, iter(grain.MapDataset.range(9).to_iter_dataset()))
    for name, value in param_values(found.trainable).items():
        np.testing.assert_array_equal(value, opened.values()[name], err_msg=name)
    flip(next(path for path in (checkpoint / "state").rglob("*") if path.is_file()))
    assert Run.open(run, log=lambda message: None).step == 2


def test_other_trained_weights_are_no_run(tmp_path):
    (tmp_path / "checkpoint.pth").touch()
    (tmp_path / "base/params").mkdir(parents=True)
    assert [Run.find(path) for path in (None, "", tmp_path / "checkpoint.pth", tmp_path / "base")] == [None] * 4


@pytest.mark.parametrize(
    ("known", "found", "all_known", "message"),
    [
        ({"mae": "a", "eva_vit": "e"}, {"mae": "a", "eva_vit": "e"}, True, None),
        ({"mae": "a", "eva_vit": "e"}, {"mae": "a"}, True, None),  # frames, whose encoder is not loaded yet
        ({"mae": "a"}, {}, False, None),
        ({"mae": "a"}, {}, True, r"mae features of a, and here they are of no encoder; give that encoder \(mae\)"),
        ({"mae": "a"}, {"mae": "b"}, False, "mae features of a, and here they are of b"),
        ({"eva_vit": "e"}, {"eva_vit": "f"}, False, r"eva_vit features of e, .* of f; .* \(eva_vit\), .*--any-enc"),
        ({"eva_vit": "file:e"}, {"eva_vit": "file:f"}, False, "eva_vit features of file:e, .* of file:f"),
        ({"eva_vit": "file:e"}, {"eva_vit": "f"}, False, None),  # the file's fingerprint and that of the parameters
        ({}, {"mae": "b", "eva_vit": "f"}, True, None),
    ],
)
def test_features_are_of_the_encoders_that_were_learnt(tmp_path, known, found, all_known, message):
    run = Run.open(write_meta(tmp_path, encoders=known))
    if message is None:
        return run.check_encoders(found, all_known=all_known)
    with pytest.raises(UserError, match=message) as caught:
        run.check_encoders(found, all_known=all_known)
    assert "\n" not in str(caught.value)


def test_the_encoder_of_frames_is_that_of_the_image_tokens_or_of_the_frames(tmp_path):
    """By the fingerprint that extraction keeps, or by its file."""
    eva_vit = EvaVit(dataclasses.replace(CONFIG.eva_vit, num_layers=1), rngs=nnx.Rngs(0))
    kept = Encoders(eva_vit=eva_vit).fingerprints(CONFIG)
    file = tmp_path / "eva_vit.pth"
    file.write_bytes(b"eva")
    learnt = lambda name, **encoders: Run.open(write_meta(tmp_path / name, encoders=encoders))
    for run in (learnt("tokens", **kept), learnt("neither", mae="a"), learnt("frames", eva_vit=file_fingerprint(file))):
        run.check_image_tokens(eva_vit)
        run.check_image_encoder({"eva_vit": file})
    with pytest.raises(UserError, match=rf"eva_vit features of another, and here they are of {kept['eva_vit']}; give"):
        learnt("other", eva_vit="another").check_image_tokens(eva_vit)
    with pytest.raises(UserError, match="eva_vit features of file:another, and here they are of file:"):
        learnt("other file", eva_vit="file:another").check_image_encoder({"eva_vit": file})


def test_the_language_model_is_the_one_that_was_learnt_on(tmp_path):
    check = lambda run, *found: check_base(run.path, run.provenance.base, "llama", "base", ModelIdentity(*found))
    run = Run.open(write_meta(tmp_path, base="sha256:a", base_origin="sha256:files"))
    for found in (("sha256:a", ""), ("sha256:int8", "sha256:files"), ("", "sha256:files"), ("", "")):
        check(run, *found)
    for found in (("sha256:b", ""), ("sha256:b", "sha256:others"), ("", "sha256:others")):
        with pytest.raises(UserError, match="trained on the language model llama, and base is another, .*--any-base"):
            check(run, *found)
    check(Run.open(write_meta(tmp_path / "old")), "sha256:b", "sha256:others")


def test_the_labels_are_those_that_were_learnt(tmp_path):
    run = Run.open(write_meta(tmp_path))
    run.check_labels(list(reversed(run.config.prompt.labels)))
    with pytest.raises(UserError, match="was trained on the labels .*, not calm, tense; .*--any-labels"):
        run.check_labels(("calm", "tense"))


def test_both_files_of_the_encoder_of_frames_are_those_that_were_learnt(tmp_path):
    files = {name: tmp_path / name for name in ("eva_vit", "ln_vision")}
    for name, file in files.items():
        file.write_bytes(name.encode())
    known = {name: file_fingerprint(file) for name, file in files.items()}
    run, without = (
        Run.open(write_meta(tmp_path / str(i), encoders=e))
        for i, e in enumerate((known, {"eva_vit": known["eva_vit"]}))
    )
    run.check_image_encoder(files)
    without.check_image_encoder(files | {"ln_vision": None})
    for one, given in (
        (run, files | {"ln_vision": None}),
        (without, files),
        (run, files | {"ln_vision": files["eva_vit"]}),
    ):
        with pytest.raises(UserError, match="was trained on ln_vision features of"):
            one.check_image_encoder(given)


@pytest.mark.parametrize(
    ("meta", "rules"),
    [
        ({"frame_rules": ["5", "first"]}, ("5", "first")),
        ({"frames": ["peak"]}, ("peak",)),
        ({"frames": None}, ()),
        ({}, ()),
    ],
)
def test_the_frame_rules_of_a_run(tmp_path, meta, rules):
    assert Run.open(write_meta(tmp_path, **meta)).provenance.frame_rules == rules

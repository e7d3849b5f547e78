"""Whole runs in this process, on the eight virtual devices."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from emollama_jax import cli
from emollama_jax.config import Config, TrainConfig, load_config
from emollama_jax.data.recipe import Recipe
from emollama_jax.errors import UserError
from emollama_jax.eval.validation import make_label_metrics
from emollama_jax.io.file_list import find_damage
from emollama_jax.models.emotion_llama import EmotionLlama
from emollama_jax.runs.checkpoint_files import find_steps
from emollama_jax.runs.run import Run
from emollama_jax.text.labels import MERR, METRICS
from emollama_jax.train import loop, setup
from emollama_jax.train.loop import End, train
from emollama_jax.weights.emotion_llama import load_emotion_llama
from emollama_jax.weights.engine import param_values
from emollama_jax.weights.model_identity import ModelIdentity, identify_model
from emollama_jax.weights.pretrained import load_llama
from emollama_jax.weights.trained import open_trained
from emollama_jax.weights.trained_export import write_folder
from tests.data.prepared import random_record, write_data
from tests.train.runs import (
    ROOT,
    arguments,
    config_of,
    environment,
    final_state,
    finish,
    lines,
    make_inputs,
    seal,
    spawn,
    trace,
)

MESH = {"mesh__data": 4, "mesh__fsdp": 2}
PTH = ROOT / "tests/data/reference_tiny/checkpoint_0.pth"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def recorded(inputs):
    """(workdir, outcome, the run as it began, its frozen weights at that time) of 4 steps with validation."""
    workdir, kept, scores = inputs / "done", [], iter([0.0, 0.25])
    fields = {"train__validation": f"{inputs}/clips:held", "train__validation_interval": 2, "train__log_interval": 2}
    fields |= {"train__best_metric": "macro_f1", "train__keep": 4, "train__profile": "(2, 3)"}

    def setup_run(*args, **kwargs):
        run = setup.setup_run(*args, **kwargs)
        kept.extend([run, jax.tree.map(np.array, jax.tree.leaves(run.frozen))])
        return run

    def more(model):
        assert isinstance(model, EmotionLlama)
        return {"macro_f1": next(scores)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "setup_run", setup_run)
        outcome = train(config_of(inputs, workdir, **MESH, **fields), more_metrics=more, heartbeat=workdir / "beat")
    return workdir, outcome, *kept


@pytest.fixture(scope="module")
def done(recorded):
    """(workdir, outcome)."""
    return recorded[:2]


def test_a_run_is_logged_validated_and_kept(done):
    workdir, outcome = done
    assert (outcome.end, outcome.step, outcome.best) == (End.DONE, 4, 4)
    two, held, four, last = lines(workdir)
    assert [line["step"] for line in (two, held, four, last)] == [2, 2, 4, 4]
    assert (held["validation_macro_f1"], last["validation_macro_f1"]) == (0.0, 0.25)
    assert last["validation_loss"] != held["validation_loss"]
    for line in (two, four):
        assert 0 < line["loss"] < 20 and line["grad_norm"] > 0
        assert line["fill"] == line["tokens"] / (8 * 256)
        assert 0 < line["goodput"] < 1 and 0 <= line["data_wait"] <= 1
        assert line["targets_per_s"] > line["clips_per_s"] > 0
        assert len(line["batch"]) == 8 and line["clips"] == 16
    assert two["learning_rate"] == pytest.approx(5.5e-3) and two["batch"] != four["batch"]
    assert find_steps(workdir) == [1, 2, 3, 4]
    assert not any(find_damage(workdir / "checkpoints" / str(step)) for step in (1, 2, 3, 4))
    assert list(workdir.glob("events.out*")) and (workdir / "config.json").is_file()
    assert list((workdir / "profile").rglob("*.xplane.pb"))
    beat = json.loads((workdir / "beat").read_text())
    assert (beat["step"], beat["steps"], beat["tokens_per_s"]) == (4, 4, four["tokens_per_s"]) and beat["left_s"] == 0


def test_only_what_is_trained_is_kept_and_changes(inputs, done):
    workdir, _ = done
    config = config_of(inputs, workdir)
    before, _ = load_emotion_llama(inputs / "base", config)
    ours = Run.open(workdir).values()
    trained = {f"llama.layers.attn.{p}.lora_{letter}" for p in ("q_proj", "v_proj") for letter in "ab"}
    names = ("image_proj", "mae_proj", "videomae_proj", "hubert_proj", "cls_proj")
    trained |= {f"projectors.{name}.{kind}" for name in names for kind in ("kernel", "bias")}
    assert set(ours) == trained
    initial = param_values(nnx.state(before))
    for name, value in ours.items():
        assert (np.asarray(initial[name]) != value).any(), name
    # The optimiser: two numbers for each of these, and the number of its steps.
    state = final_state(workdir)
    sizes = lambda prefix: {n.removeprefix(prefix): v.shape for n, v in state.items() if n.startswith(prefix)}
    assert sizes("opt_state.0.mu.") == sizes("opt_state.0.nu.") == sizes("trainable.")
    assert len(state) == 3 * len(trained) + 3 and state["step"] == state["opt_state.0.count"] == 4


@pytest.mark.slow
def test_where_float64_is_the_default_of_jax_a_run_and_its_exports_are_the_same(inputs, done, tmp_path):
    """JAX_ENABLE_X64: the same batches and losses, and float32 throughout.

    XLA rounds differently then, and AdamW's first updates are of the size of the learning rate, 1e-2, however small a
    gradient: values differ by less than a tenth of it.
    """
    exports = lambda run, out: [
        ["export", str(run), str(out / "peft"), "--to", "peft"],
        ["export", str(run), str(out / "hf"), "--to", "hf", "--base", str(inputs / "base"), "--dtype", "float32"],
    ]
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    verbs = [["train", *arguments(inputs, theirs / "run", **MESH)], *exports(theirs / "run", theirs)]
    code = "import json, sys; from emollama_jax import cli; sys.exit(any(map(cli.main, json.loads(sys.argv[1]))))"
    child = spawn([sys.executable, "-c", code, json.dumps(verbs)], environment(8) | {"JAX_ENABLE_X64": "1"})
    assert not any(map(cli.main, exports(done[0], ours)))
    finish(child, 0)
    others = {line["step"]: line for line in lines(theirs / "run")}
    for line in lines(done[0]):
        if "batch" in line:
            assert line["batch"] == others[line["step"]]["batch"]
            assert line["loss"] == pytest.approx(others[line["step"]]["loss"], rel=1e-4)
    files = [file.relative_to(ours) for file in ours.rglob("*.safetensors")]
    assert len(files) == 4
    pairs = [(load_file(ours / file), load_file(theirs / file)) for file in files]
    for one, other in ((final_state(done[0]), final_state(theirs / "run")), *pairs):
        assert {n: x.dtype for n, x in one.items()} == {n: x.dtype for n, x in other.items()}
        assert {x.dtype for x in one.values()} <= {np.dtype("float32"), np.dtype("int32")}
        for name in one:
            np.testing.assert_allclose(other[name], one[name], rtol=1e-5, atol=1e-3, err_msg=name)


def first_state(monkeypatch, config):
    """The run as it is before its first step, which is not taken."""

    class Begun(Exception):
        pass

    def setup_run(*args, **kwargs):
        raise Begun(setup.setup_run(*args, **kwargs))

    with monkeypatch.context() as patch, pytest.raises(Begun) as caught:
        patch.setattr(loop, "setup_run", setup_run)
        train(config)
    run = caught.value.args[0]
    run.iterator.close()
    return run


def test_frozen_weights_are_unchanged_by_training(recorded):
    *_, run, before = recorded
    after = jax.tree.leaves(run.frozen)
    assert len(before) == len(after) > 10
    for old, new in zip(before, after, strict=True):
        assert old.tobytes() == np.asarray(new).tobytes()


def test_new_adapters_change_nothing(inputs, tmp_path):
    """B is zero: at step 0 the logits are the base model's."""
    tokens, positions = jnp.arange(12)[None] + 3, jnp.arange(12)[None]
    logits = lambda llama: llama.logits(llama(llama.embed_tokens(tokens), positions, jnp.ones((1, 12), jnp.int32)))
    adapted, _ = load_emotion_llama(inputs / "base", config_of(inputs, tmp_path))
    plain, _ = load_llama(inputs / "base", compute_dtype="float32")
    np.testing.assert_array_equal(logits(adapted.llama), logits(plain))


def test_resume_comes_before_trained_weights_and_that_before_new_weights(inputs, done, tmp_path, monkeypatch):
    workdir, _ = done
    trained, fields = Run.open(workdir).values(), {**MESH, "weights__trained": workdir}

    def differing(run):
        found = param_values(run.state.trainable)
        assert found.keys() == trained.keys()
        return [name for name in found if (np.asarray(found[name]) != trained[name]).any()]

    new = first_state(monkeypatch, config_of(inputs, tmp_path / "new", **MESH))
    assert new.step == 0 and len(differing(new)) == len(trained)
    given = first_state(monkeypatch, config_of(inputs, tmp_path / "given", **fields))
    assert given.step == 0 and differing(given) == []
    assert not np.any(jax.tree.leaves(given.state.opt_state)[-1])
    third = first_state(
        monkeypatch, config_of(inputs, tmp_path / "third", **fields | {"weights__trained": workdir / "checkpoints/3"})
    )
    assert differing(third)
    resumed = first_state(monkeypatch, config_of(inputs, workdir, **MESH, weights__trained="nowhere"))
    assert resumed.step == 4 and differing(resumed) == [] and int(resumed.state.step) == 4


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"lora__dropout": 0.1}, r"config\.lora\.dropout was 0\.05 in this run and is 0\.1 now: .*weights.trained="),
        ({"train__beta2": 0.99}, r"config\.train\.beta2 was 0\.999"),
        ({"data__sequence_length": 288}, r"config\.data\.sequence_length was 256"),
        ({"prompt__tasks": "emotion"}, r"config\.prompt\.tasks was \['emotion', 'reason'\]"),
        ({"seed": 8}, r"config\.seed was 7"),
        ({"trainable": "lora,image_proj"}, r"config\.trainable was"),
        ({"train__grad_accum_steps": 1, "train__clip_norm": 1.0}, r"config\.train\.clip_norm was 0\.0"),
    ],
)
def test_another_experiment_does_not_go_on(inputs, done, fields, message):
    with pytest.raises(UserError, match=message) as caught:
        train(config_of(inputs, done[0], **MESH, **fields))
    assert "\n" not in str(caught.value)


def test_other_data_or_another_base_does_not_go_on(inputs, done, tmp_path):
    data = write_data(tmp_path / "data", {"train": 60, "held": 6}, image="image_tokens")
    seal(data, "another")
    with pytest.raises(UserError, match=r"config\.data\.train: not what this run was begun with, .*weights.trained="):
        train(config_of(inputs, done[0], **MESH, data__train=f"{data}:train"))
    base = tmp_path / "base"
    assert cli.main(["convert", str(inputs / "base"), str(base), "--dtype", "bfloat16"]) == 0
    with pytest.raises(UserError, match=r"config\.weights\.base: not what this run was begun with"):
        train(config_of(inputs, done[0], **MESH, weights__base=base))


def test_features_of_other_encoders_are_refused(inputs, done, tmp_path):
    """From a run that learnt others, and where the training's and the validation's differ."""
    data = write_data(tmp_path / "data", {"train": 60, "held": 6}, image="image_tokens", encoders={"mae": "other"})
    fields = {**MESH, "data__train": f"{data}:train", "weights__trained": done[0]}
    with pytest.raises(
        UserError, match=r"trained on mae features of one, and here they are of other; .* begin without weights.trained"
    ):
        train(config_of(inputs, tmp_path / "from", **fields))
    with pytest.raises(UserError, match=r"mae features of different encoders .*one.*other"):
        train(config_of(inputs, tmp_path / "mixed", **MESH, train__validation=f"{data}:held"))


def test_adapters_of_another_language_model_are_refused(inputs, tmp_path):
    pytest.importorskip("torch")
    trained, adapter = open_trained(PTH), tmp_path / "adapter"
    adapter.mkdir()
    known = ModelIdentity("sha256:another", "sha256:files")
    write_folder(adapter, trained.reference_tensors(), trained.lora, base="a/name", base_identity=known)
    said = r"trained on the language model a/name, and .*base is another, .*emollama export .*--to peft --any-base"
    with pytest.raises(UserError, match=said):
        train(config_of(inputs, tmp_path / "run", **MESH, weights__trained=adapter))
    assert cli.main(["export", str(adapter), str(tmp_path / "free"), "--to", "peft", "--any-base"]) == 0
    with pytest.raises(UserError, match="with scale 2, the model's"):  # the next thing that is looked at
        train(config_of(inputs, tmp_path / "run", **MESH, weights__trained=tmp_path / "free", lora__alpha=32))


def test_what_changes_no_step_may_change(inputs, done):
    """The run is done: nothing is trained."""
    before = trace(done[0])
    fields = {"train__log_interval": 7, "train__non_finite": "skip", "llama__remat": "none", "data__prefetch": 3}
    outcome = train(config_of(inputs, done[0], mesh__data=8, train__checkpoint_interval=3, **fields))
    assert (outcome.end, outcome.step) == (End.DONE, 4)
    assert trace(done[0]) == before


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"weights__base": "nowhere"}, r"weights\.base: no base checkpoint: nowhere; make one with emollama convert"),
        ({"mesh__data": 3}, r"config\.mesh data=3 .* does not fit 8 devices"),
        ({"train__grad_accum_steps": 3}, r"config\.train\.grad_accum_steps=3: data\.batch_rows=8 must be a multiple"),
    ],
)
def test_what_cannot_be_is_one_line(inputs, tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        train(config_of(inputs, tmp_path / "run", **{**MESH, **fields}))
    assert not (tmp_path / "run").exists()


def test_a_run_needs_a_folder_and_a_base():
    no_base = r"weights\.base: no base checkpoint: weights/llama2"
    for fields, message in (({}, r"train\.workdir: no folder"), ({"workdir": "x"}, no_base)):
        with pytest.raises(UserError, match=message):
            train(Config(train=TrainConfig(**fields)))


def test_compiled_programs_are_kept_in_the_folder_named(inputs, done):
    """Where JAX was told of none, by its environment say."""
    told, another = jax.config.jax_compilation_cache_dir, config_of(inputs, done[0], **MESH, seed=8)
    try:
        for before, after in ((told, told), (None, str(inputs / "compiled"))):
            jax.config.update("jax_compilation_cache_dir", before)
            with pytest.raises(UserError, match="was 7"):
                train(another)
            assert jax.config.jax_compilation_cache_dir == after
    finally:
        jax.config.update("jax_compilation_cache_dir", told)


@pytest.mark.slow
def test_it_ends_when_the_validation_gets_no_better(inputs, tmp_path):
    fields = {"train__validation": f"{inputs}/clips:held", "train__validation_interval": 1, "train__patience": 2}
    config = config_of(inputs, tmp_path / "run", **MESH, **fields, train__best_metric="macro_f1")
    scores = iter([0.3, 0.2, 0.3, 0.9])
    outcome = train(config, more_metrics=lambda model: {"macro_f1": next(scores)})
    assert (outcome.end, outcome.step, outcome.best) == (End.EARLY, 3, 1)
    assert find_steps(tmp_path / "run") == [1, 2, 3]  # the best, and the newest two
    assert train(config, more_metrics=lambda model: {"macro_f1": next(scores)}).step == 3  # and it stays ended
    assert next(scores) == 0.9


@pytest.mark.slow
def test_the_best_checkpoint_is_that_of_the_best_labels(inputs, tmp_path, capsys):
    workdir = tmp_path / "run"
    fields = {"train__validation": f"{inputs}/clips:held", "train__validation_interval": 1, "train__steps": 3}
    argv = arguments(inputs, workdir, **MESH, **fields, train__best_metric="uar")
    assert cli.main(["train", *argv]) == 0
    found = [line["validation_uar"] for line in lines(workdir) if "validation_uar" in line]
    assert len(found) == 3 and all(0 <= value <= 1 for value in found)
    best = 1 + found.index(max(found))
    assert f"the best checkpoint is that of step {best}" in capsys.readouterr().err
    trained = Run.open(workdir / "checkpoints/3").trained_weights()
    model, _ = load_emotion_llama(inputs / "base", load_config("tiny"), trained=trained)
    expected = make_label_metrics(config_of(inputs, workdir, **fields, train__best_metric="uar"))(model)
    assert found[-1] == pytest.approx(expected["uar"], abs=1e-6)
    last = [line for line in lines(workdir) if "validation_uar" in line][-1]
    assert set(METRICS) <= {name.removeprefix("validation_") for name in last}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train__best_metric": "f2"}, "train.best_metric='f2': choose one of loss, accuracy, weighted_precision"),
        ({"train__best_metric": "uar", "prompt__labels": "calm,tense"}, "prompt.labels has calm, tense"),
    ],
)
def test_a_metric_that_cannot_be_measured_is_one_line_before_any_step(inputs, tmp_path, capsys, fields, message):
    fields |= {"train__validation": f"{inputs}/clips:held"}
    assert cli.main(["train", *arguments(inputs, tmp_path / "run", **fields)]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_metric_of_labels_needs_what_measures_it(inputs, tmp_path):
    fields = {"train__validation": f"{inputs}/clips:held", "train__best_metric": "uar"}
    with pytest.raises(UserError, match=r"train\.best_metric=uar: needs more_metrics"):
        train(config_of(inputs, tmp_path / "run", **MESH, **fields))


@pytest.mark.slow
def test_a_step_that_is_not_finite_ends_the_run_or_is_skipped(inputs, tmp_path):
    rng, recipe = (
        np.random.default_rng(0),
        Recipe(labels=MERR, image_storage="image_tokens", image_tokens_shape=(17, 48)),
    )
    records = [random_record(i, rng, recipe) for i in range(60)]
    records[3]["features"] = np.full((3, 1024), np.nan, np.float32)
    records[3]["has_feature"] = np.ones(3, bool)
    data = write_data(tmp_path / "data", {"train": 60}, image="image_tokens", records=records)
    workdir = tmp_path / "run"
    fields = {**MESH, "data__train": f"{data}:train"}
    outcome = train(config_of(inputs, workdir, **fields))
    bad = outcome.step
    assert outcome.end is End.NON_FINITE and 1 <= bad <= 4
    assert f"step {bad}: " in outcome.message and "clip 3" in outcome.message
    good = f"{workdir}/checkpoints/{bad - 1}" if bad > 1 else "no checkpoint yet"
    assert outcome.message.endswith(good)
    assert lines(workdir)[-1]["skipped"] and lines(workdir)[-1]["loss"] is None

    assert cli.main(["train", *arguments(inputs, workdir, **fields)]) == 4  # again, at the same step
    outcome = train(config_of(inputs, workdir, **fields, train__non_finite="skip"))
    assert (outcome.end, outcome.step) == (End.DONE, 4)
    assert [line["step"] for line in lines(workdir)] == [1, 2, 3, 4]
    assert [line["step"] for line in lines(workdir) if "skipped" in line] == [bad]
    for name, value in Run.open(workdir).values().items():
        assert np.isfinite(value).all(), name


@pytest.mark.slow
def test_from_a_reference_checkpoint_and_back(inputs, tmp_path, monkeypatch):
    """What the model does not use is carried through the run; what is not trained is kept."""
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    workdir = Path("run")  # as users name it
    fields = {"weights__trained": PTH, "trainable": "lora,cls_proj"}
    assert train(config_of(inputs, workdir, **MESH, **fields)).end is End.DONE
    resumed = first_state(monkeypatch, config_of(inputs, workdir, **MESH, **fields | {"weights__trained": "nowhere"}))
    assert cli.main(["export", str(workdir), str(tmp_path / "out.pth"), "--to", "pth"]) == 0
    assert cli.main(["export", str(workdir / "checkpoints/4"), str(tmp_path / "peft"), "--to", "peft"]) == 0
    given, pth, peft = open_trained(PTH), open_trained(tmp_path / "out.pth"), open_trained(tmp_path / "peft")
    assert pth.adapter_name == given.adapter_name
    before, after, folder = (trained.reference_tensors() for trained in (given, pth, peft))
    assert before.keys() == after.keys() == folder.keys()
    assert any(name.startswith("attention.") for name in before)
    for name in before:
        trained = "lora_" in name or name.startswith("cls_tk_llama_proj.")
        assert (np.asarray(before[name], np.float32) != after[name]).any() == trained, name
        np.testing.assert_array_equal(after[name], folder[name])
    projector = param_values(resumed.frozen)["projectors.image_proj.kernel"]
    np.testing.assert_array_equal(np.asarray(projector).T, before["llama_proj.weight"].astype(np.float32))
    base = str(inputs / "base")
    assert cli.main(["export", str(workdir), str(tmp_path / "hf"), "--to", "hf", "--base", base]) == 0
    assert (tmp_path / "hf/config.json").is_file()
    assert (peft.base, peft.base_identity) == (str(ROOT / "tests/data/reference_tiny/llama"), identify_model(base))


@pytest.mark.slow
def test_frames_go_through_the_frozen_encoder(inputs, tmp_path):
    pytest.importorskip("torch")
    data = write_data(tmp_path / "data", {"train": 40})
    reference = ROOT / "tests/data/reference_tiny"
    fields = {
        **MESH,
        "data__train": f"{data}:train",
        "train__steps": 2,
        "train__warmup_steps": 1,
        "train__warmup_from": 0.0,
    }
    with pytest.raises(UserError, match=r"weights\.eva_vit: no such file: weights/eva_vit_g.pth; the data"):
        train(config_of(inputs, tmp_path / "run", **fields))
    fields |= {"weights__eva_vit": reference / "eva_vit_tiny.pth", "weights__ln_vision": reference / "ln_vision.pth"}
    assert train(config_of(inputs, tmp_path / "run", **fields)).end is End.DONE
    assert not [name for name in Run.open(tmp_path / "run").values() if name.startswith("eva_vit")]
    other = tmp_path / "other.pth"
    other.write_bytes((reference / "eva_vit_tiny.pth").read_bytes() + b"\0")
    with pytest.raises(UserError, match=r"config\.weights\.eva_vit: not what this run was begun with"):
        train(config_of(inputs, tmp_path / "run", **fields | {"weights__eva_vit": other}))

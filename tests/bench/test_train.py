"""The measurement of training: both train the same model on the same clips, or there is no measurement."""

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest
from flax import nnx

from emollama_jax import cli
from emollama_jax.bench import report as bench_report
from emollama_jax.bench import train_peer, training
from emollama_jax.bench.peer import PEER
from emollama_jax.bench.predict import Pieces
from emollama_jax.bench.report import OURS
from emollama_jax.bench.train import amount_of, bench_train, make_batches, with_frames
from emollama_jax.bench.train_peer import one_clip_a_row
from emollama_jax.config import Config, load_config
from emollama_jax.data.batch import soft_tokens_per_clip
from emollama_jax.models.llama import Llama
from emollama_jax.train.speed import Peak, cost_of, encoder_flops
from emollama_jax.weights.encoders import random_encoder

TINY = load_config("tiny")
SOFT = soft_tokens_per_clip(TINY)
TASKS = ("emotion", "reason")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Without a pause, and torch on one thread: two that wait for each other beside other work take seconds a step."""
    monkeypatch.setattr(bench_report, "SETTLE_S", 0)
    monkeypatch.setattr("os.cpu_count", lambda: 1)


def experiment(**changes) -> Config:
    """Two rows of 400; no dropout, which is drawn otherwise in torch. Doubled underscores are dots."""
    config = TINY
    changes = {"lora__dropout": 0.0, "llama__remat": "none"} | changes
    changes = {"data__sequence_length": 400, "data__batch_rows": 2, "data__packing_rows": 2} | changes
    for name, value in changes.items():
        group, _, field = name.partition("__")
        value = dataclasses.replace(getattr(config, group), **{field: value}) if field else value
        config = dataclasses.replace(config, **{group: value})
    return config


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {
            "llama__remat": "full",
            "llama__num_kv_heads": 2,
            "llama__tie_embeddings": True,
            "lora__targets": ("q_proj", "o_proj", "down_proj"),
            "train__clip_norm": 0.1,
            "train__weight_decay": 5.0,
            "train__beta2": 0.9,
        },
        {"trainable": ("image_proj", "mae_proj")},
    ],
    ids=["all", "some"],
)
def test_both_train_the_same_model(changes):
    """The losses stay together over many steps of a high rate, on batches that differ."""
    pytest.importorskip("peft")
    report = bench_train(experiment(**changes), steps=2, clips=16, repeats=3)
    ours, theirs = (np.array(result.output) for result in report.results)
    assert ours.shape == theirs.shape == (8, 2)  # loss and gradient's norm
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert ours[-1, 0] < ours[1, 0] - 1e-3
    for mine, other in zip(*(result.runs for result in report.results), strict=True):
        assert [mine[name] for name in ("clips", "tokens", "targets")] == [
            other[name] for name in ("clips", "tokens", "targets")
        ]


@pytest.mark.slow
def test_both_begin_alike_in_half_precision():
    pytest.importorskip("peft")
    dtypes = dict.fromkeys(("llama__kernel_dtype", "llama__param_dtype", "llama__compute_dtype"), "bfloat16")
    report = bench_train(experiment(**dtypes), clips=16, repeats=1)
    ours, theirs = (result.output[0] for result in report.results)
    np.testing.assert_allclose(ours, theirs, rtol=training.ROUGH_TOLERANCE / 10)


def test_other_weights_are_an_error(monkeypatch):
    pytest.importorskip("peft")
    made = train_peer.torch_projectors

    def other(projectors):
        peer = made(projectors)
        peer["image_proj"].weight.data.mul_(1.5)
        return peer

    monkeypatch.setattr(train_peer, "torch_projectors", other)
    with pytest.raises(RuntimeError, match=rf"of the first step are {OURS} \d.*, {PEER} \d"):
        bench_train(experiment(lora__rank=0), clips=16, repeats=1)


def test_it_gives_a_table_and_every_repeat_as_json(tmp_path, capsys):
    pytest.importorskip("peft")
    file = tmp_path / "train.json"
    sizes = ["--config.data.sequence_length=400", "--config.data.batch_rows=2", "--config.data.packing_rows=2"]
    argv = ["train", "--config=tiny", *sizes, "--clips=16", "--tasks", "reason", "--repeats=2", "--json", str(file)]
    assert cli.main(["bench", *argv]) == 0
    data = json.loads(file.read_text())
    assert [(r["who"], len(r["runs"])) for r in data["results"]] == [(OURS, 2), (PEER, 2)]
    ours, theirs = data["results"]
    assert ours["batch"] == theirs["batch"] == ours["best"]["clips"]
    for figures in ours["runs"] + theirs["runs"]:
        assert figures["clips_per_s"] == pytest.approx(figures["clips"] / figures["seconds"])
        assert figures["targets_per_s"] == pytest.approx(figures["targets"] / figures["seconds"])
        assert figures["ms_per_step"] == pytest.approx(1e3 * figures["seconds"])
        assert figures["targets"] > 30 * figures["clips"]  # captions, not labels
        assert 30 < figures["fill_percent"] <= 100
    assert ours["best"]["fill_percent"] == pytest.approx(100 * ours["best"]["tokens"] / 800)
    assert data["config"]["prompt"]["tasks"] == ["reason"]
    settings = {"tasks": "reason", "images": "image_tokens", "steps": 1, "clips": 16, "repeats": 2}
    assert data["settings"] == settings | {"attention": "chunked"}
    table = capsys.readouterr().out
    assert sum(line.endswith("x") for line in table.splitlines()) == 1 and "clips/s" in table


@pytest.mark.smoke
def test_without_torch_and_where_the_peak_is_known(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torch" else find_spec(name, *a))
    monkeypatch.setattr(bench_report, "device_peak_flops", lambda kind: Peak(flops=1e9, bytes_per_s=1e9))
    monkeypatch.setattr(training, "peak_memory", lambda: {"host_gib": 1.0, "device_gib": 2.5})
    report = bench_train(experiment(lora__dropout=0.1), steps=2, clips=16, repeats=1)
    assert [result.who for result in report.results] == [OURS]
    assert any(note.startswith("no peer: torch") for note in report.notes)
    (figures,) = report.results[0].runs
    flops = cost_of(Llama(TINY.llama, TINY.lora, rngs=nnx.Rngs(0))).flops(
        figures["tokens"], figures["tokens"] / figures["clips"]
    )
    assert figures["peak_percent"] == pytest.approx(100 * flops / figures["seconds"] / 1e9)
    assert figures["steps"] == 2 and figures["ms_per_step"] == pytest.approx(1e3 * figures["seconds"] / 2)
    assert figures["device_gib"] == 2.5
    assert "% peak" in str(report) and "GiB" in report.columns.values()


@pytest.mark.slow
def test_the_encoder_can_be_a_part_of_the_step(monkeypatch, tmp_path):
    """Its operations count beside those of the language model."""
    monkeypatch.setattr(bench_report, "device_peak_flops", lambda kind: Peak(flops=1e9, bytes_per_s=1e9))
    report = bench_train(experiment(), clips=16, repeats=1, images="frames", trace=tmp_path / "trace")
    (result,) = report.results
    (figures,), language = result.runs, cost_of(Llama(TINY.llama, TINY.lora, rngs=nnx.Rngs(0)))
    flops = language.flops(figures["tokens"], figures["tokens"] / figures["clips"])
    flops += figures["clips"] * encoder_flops(random_encoder("eva_vit", TINY.eva_vit, 0), 0)
    assert figures["peak_percent"] == pytest.approx(100 * flops / figures["seconds"] / 1e9)
    assert figures["percent_4n"] == pytest.approx(100 * language.flops_4n(figures["tokens"]) / figures["seconds"] / 1e9)
    assert any(note.startswith("no peer: it has image tokens") for note in report.notes)
    assert report.settings["images"] == "frames"
    assert result.breakdown.operations and "the longest" in str(report)


def test_frames_take_the_place_of_image_tokens():
    batches = with_frames(make_batches(experiment(), clips=16, count=2), experiment())
    assert [batch.image_tokens for batch in batches] == [None, None]
    shape = (2, TINY.data.clips_per_row, TINY.eva_vit.image_size, TINY.eva_vit.image_size, 3)
    frames = np.concatenate([batch.frames for batch in batches])
    assert frames.shape == (4, *shape[1:]) and frames.dtype == np.uint8
    assert len(np.unique(frames.reshape(-1, *shape[2:]), axis=0)) == 4 * TINY.data.clips_per_row


def test_the_clips_are_of_many_lengths_and_repeatable():
    batches = make_batches(experiment(prompt__tasks=TASKS), clips=24, count=3)
    again = make_batches(experiment(prompt__tasks=TASKS), clips=24, count=3)
    jax.tree.map(np.testing.assert_array_equal, batches, again)
    tokenizer, eos, lengths, answers = Pieces(TINY.llama.vocab_size), TINY.llama.vocab_size - 1, set(), set()
    labels = {tuple(tokenizer.encode(label)) for label in TINY.prompt.labels}
    for batch in batches:
        assert batch.image_tokens.shape == (2, 6, 1 + TINY.eva_vit.grid**2, TINY.eva_vit.hidden_size)
        rows = one_clip_a_row(batch, SOFT)
        lengths |= set(rows["attention_mask"].sum(axis=1).tolist())
        for tokens, weights in zip(rows["tokens"], rows["loss_weights"], strict=True):
            answer = tuple(tokens[1:][weights[:-1] > 0].tolist())
            assert answer[-1] == eos
            answers.add("emotion" if answer[:-1] in labels else "reason")
        assert len(np.unique(rows["image_tokens"], axis=0)) > 1
    assert len(lengths) > 5
    assert answers == set(TASKS)
    rows = [one_clip_a_row(batch, SOFT) for batch in batches]
    assert amount_of(batches) == (
        3,
        sum(len(row["tokens"]) for row in rows),
        sum(row["attention_mask"].sum() for row in rows),
        sum((row["loss_weights"] > 0).sum() for row in rows),
    )


def test_what_cannot_be_measured_is_told_in_one_line(capsys):
    def error(*argv: str) -> str:
        assert cli.main(["bench", "train", "--config=tiny", *argv]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "leave it at 1" in error("--config.train.grad_accum_steps=2")
    assert "leave config.mesh at 1" in error("--config.mesh.fsdp=2")
    assert "nothing to train" in error("--config.trainable=lora", "--config.lora.rank=0")
    assert "raise data.sequence_length" in error("--config.data.sequence_length=64", "--clips=2", "--no-peer")
    assert "invalid choice: 'guess'" in error("--tasks", "guess")

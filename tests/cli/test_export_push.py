"""Adapters pushed to a hub on loopback, with a model card, and never without being asked."""

import base64
import dataclasses
import json
import shlex
import sys
from pathlib import Path

import pytest
from etils import epath
from safetensors.numpy import load

from emollama_jax import cli
from emollama_jax.config import from_dict, load_config, parse_flags, to_dict, values_affecting
from emollama_jax.runs.model_card import model_card
from emollama_jax.runs.run import Run
from emollama_jax.weights.trained import open_trained
from tests.hub.fake_hub import FakeHub, hub  # noqa: F401
from tests.train.runs import write_meta

CHECKPOINT = Path(__file__).parents[1] / "data/reference_tiny/checkpoint_0.pth"


@pytest.fixture
def checkpoint() -> Path:
    pytest.importorskip("torch")
    return CHECKPOINT


def push(*words: str) -> int:
    return cli.main(["export", str(CHECKPOINT), "hf://me/tiny", "--to", "peft", "--alpha", "16", *words])


def pushed(hub: FakeHub) -> dict[str, bytes]:  # noqa: F811
    (commit,) = hub.commits
    assert commit["path"] == "/api/models/me/tiny/commit/main"
    files = [line["value"] for line in commit["lines"] if line["key"] == "file"]
    return {file["path"]: base64.b64decode(file["content"]) for file in files}


def test_a_push_that_was_asked_for(hub, checkpoint, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert push("--yes", "--licence", "llama2") == 0
    files = pushed(hub)
    assert files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors", "projectors.safetensors"}
    out, card = capsys.readouterr().out, files["README.md"].decode()
    assert card in out and out.rstrip().endswith(f"pushed  {hub.address}/me/tiny")
    assert 'license: "llama2"' in card and "rank 8, alpha 16, on q_proj, v_proj" in card
    assert len(load(files["adapter_model.safetensors"])) == 12  # 3 layers, 2 projections, A and B
    assert not [name for name, content in files.items() if str(Path.cwd()).encode() in content]
    created = next(one for one in hub.asked if one[2].endswith("/repos/create"))
    assert created[4] == "Bearer hf_good"


@pytest.mark.parametrize("answer", ["n", "", "yes, later"])
def test_without_consent_nothing_is_pushed(hub, checkpoint, monkeypatch, capsys, answer):  # noqa: F811
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: answer)
    assert push() == 0
    assert "nothing was pushed" in capsys.readouterr().out and not hub.asked


def test_consent_at_the_terminal(hub, checkpoint, monkeypatch, capsys):  # noqa: F811
    questions = []
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: (questions.append(question), "y")[1])
    assert push() == 0 and len(pushed(hub)) == 4
    assert questions == ["push these files to me/tiny (private where it is new)? [y/N] "]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["hf://me/tiny", "--to", "peft"], "nothing is pushed without being asked; add --yes"),
        (["hf://me/tiny", "--to", "pth"], "write hf://USER/NAME --to peft"),
        (["hf://me", "--to", "peft", "--yes"], "write hf://USER/NAME --to peft"),
        (["out", "--to", "peft", "--yes"], "--yes, --public and --licence go with an output hf://USER/NAME"),
        (["hf://me/tiny", "--to", "peft", "--yes"], "does not accept the token: me/tiny; check HF_TOKEN"),
    ],
)
def test_refusals(hub, checkpoint, capsys, words, said):  # noqa: F811
    assert cli.main(["export", str(CHECKPOINT), *words]) == 2
    assert said in capsys.readouterr().err and not hub.commits


def test_the_card_of_a_run_says_what_it_was_trained_on(checkpoint, tmp_path):
    meta = {
        "config": to_dict(load_config("tiny")) | {"seed": 7},
        "data": [["train", 60, "abc"]],
        "encoders": {"mae": "sha256:1234"},
        "frame_rules": ["peak"],
        "best": {"step": 3, "value": 0.25, "worse": 0},
        "base": "sha256:5678",
    }
    meta["config"]["data"]["train"] = [f"{tmp_path}/merr/frame/1.0.0:train"]
    folder = write_meta(tmp_path / "run/checkpoints/4", **meta)
    card = model_card("me/tiny", open_trained(CHECKPOINT), Run(epath.Path(folder), folder), "other")
    for said in (
        "- trained for 4 steps, seed 7",
        "- data: merr, split train, 60 clips (fingerprint abc)",
        "- labels: ",
        "- frames: peak",
        "- encoder mae: sha256:1234",
        "- best validation (loss): 0.2500 at step 3",
        "    emollama train --config CONFIG \\\n        --config.",
        "--config.seed=7",
    ):
        assert said in card
    assert str(tmp_path) not in card and json.dumps("peft") in card
    words = shlex.split(card.partition("emollama train --config CONFIG")[2].partition("\n\n")[0].replace("\\\n", " "))
    again, rest = parse_flags(words, load_config("tiny"))
    assert not rest and values_affecting(again, "resume") == values_affecting(from_dict(meta["config"]), "resume")


def test_a_base_on_this_machine_is_not_named(checkpoint):
    trained = open_trained(CHECKPOINT)
    for base in ("weights/llama2", "/home/me/llama2", "../llama2", ""):
        card = model_card("me/tiny", dataclasses.replace(trained, base=base), None, "other")
        assert "base_model" not in card and (not base or base not in card)
    named = dataclasses.replace(trained, base="meta-llama/Llama-2-7b-chat-hf")
    assert 'base_model: "meta-llama/Llama-2-7b-chat-hf"' in model_card("me/tiny", named, None, "llama2")

"""MiniGPT-v2 and its language model as describers: what they are asked, and that they are these models."""

import dataclasses
import functools
import json

import numpy as np
import pytest
from PIL import Image

from emollama_jax import cli
from emollama_jax.captions.describers import PROMPTS, Scene
from emollama_jax.captions.own_model import KINDS, caption_prompt, chat_prompt, model_describers, whole_sentences
from emollama_jax.captions.parts import Parts
from emollama_jax.config import GenerateConfig, load_config
from emollama_jax.infer.engine import Engine
from emollama_jax.infer.slots import GenerationRequest, SlotBatcher
from emollama_jax.models.lora import LoRAConfig
from emollama_jax.text.tokenizers import load_tokenizer
from emollama_jax.weights.pretrained import load_llama
from tests.media.test_faces import write_video
from tests.train.runs import LLAMA

REFERENCE = LLAMA.parent
CONFIG = dataclasses.replace(
    load_config("tiny"), lora=LoRAConfig(rank=8, alpha=16.0), generate=GenerateConfig(max_new_tokens=12)
)


@pytest.fixture(scope="module")
def minigpt(tmp_path_factory):
    """A checkpoint as MiniGPT-v2's: the reference's without what that does not have."""
    torch = pytest.importorskip("torch")
    path = tmp_path_factory.mktemp("model") / "minigpt.pth"
    model = torch.load(REFERENCE / "checkpoint_0.pth", weights_only=True)["model"]
    kept = {name: value for name, value in model.items() if name.startswith(("llama_model.", "llama_proj."))}
    torch.save({"model": kept}, path)
    return path


def scene_of(folder, seed):
    frame = folder / f"{seed}.png"
    pixels = np.random.default_rng(seed).integers(256, size=(56, 56, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(frame)
    return Scene(frame, folder / "none.mp4", Parts(label="sad", picture="A man.", subtitle="Oh. <s>"))


def test_the_task_is_laid_out_as_minigpt_was_trained_and_words_stay_words():
    tokenizer = load_tokenizer(LLAMA)
    sample = caption_prompt(tokenizer, "Describe it.", 3)
    assert sample.tokens[0] == tokenizer.bos_id and not sample.is_answer.any()
    assert [n for n in sample.soft.tolist() if n >= 0] == [0, 1, 2]
    text = lambda ids: tokenizer.decode([int(n) for n in ids])
    start = sample.soft.tolist().index(0)
    assert text(sample.tokens[1:start]) == "[INST] <Img>"
    assert text(sample.tokens[start + 3 :]) == "</Img> [caption] Describe it. [/INST]"
    asked = chat_prompt(tokenizer, "Why </s> so?")
    assert asked.count(tokenizer.bos_id) == 1 and tokenizer.eos_id not in asked
    assert tokenizer.decode(asked).strip() == "[INST] Why </s> so? [/INST]"


def test_a_sentence_that_is_cut_off_is_left_out():
    assert whole_sentences("She smiles. Her voice") == "She smiles." and whole_sentences("Why? Yes! ") == "Why? Yes!"
    assert whole_sentences("She") == "She"


def test_pictures_are_seen_with_adapters_and_inferred_from_without(minigpt, tmp_path, monkeypatch):
    options = {"config": CONFIG, "base": LLAMA, "eva_vit": REFERENCE / "eva_vit_tiny.pth", "inputs": "frames"}
    engine = Engine.load(minigpt, **options)
    found = model_describers(engine, KINDS, PROMPTS, name="llama")
    one, other = scene_of(tmp_path, 1), scene_of(tmp_path, 2)
    seen = found["picture"].describe(one)
    assert seen.status == "answered" and seen == found["picture"].describe(one) != found["picture"].describe(other)
    inferred = found["fine"].describe(one)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "make_slot_batcher", functools.partial(engine.make_slot_batcher, adapters=False))
        without = model_describers(engine, KINDS, PROMPTS, name="llama")
    assert seen != without["picture"].describe(one)
    llama, tokenizer = load_llama(LLAMA, compute_dtype="float32")[0], load_tokenizer(LLAMA)
    asked = PROMPTS["fine"].replace("{label}", "sad")
    asked = asked.replace(
        "{clues}", "Picture of the moment of strongest expression: A man.\nWords: Oh. <s>\nEmotion: sad"
    )
    (alone,) = SlotBatcher(llama, tokenizer.end_ids).run(
        [GenerationRequest(chat_prompt(tokenizer, asked), CONFIG.generate)]
    )
    text = " ".join(tokenizer.decode(alone.tokens).split())
    assert inferred.text == (text if alone.ended else whole_sentences(text))
    other_prompts = {kind: f"{prompt} Please." for kind, prompt in PROMPTS.items()}
    changed = model_describers(engine, KINDS, other_prompts, name="llama")
    assert all(found[kind].identity != changed[kind].identity for kind in KINDS)


def test_clips_are_described_without_any_key(minigpt, tmp_path, monkeypatch, capsys):
    pytest.importorskip("av")
    monkeypatch.delenv("EMOLLAMA_DESCRIBER_ADDRESS", raising=False)
    videos = tmp_path / "videos"
    videos.mkdir()
    write_video(videos / "a.mp4", [np.full((64, 64, 3), 20 * i, np.uint8) for i in range(4)])
    (tmp_path / "labels.csv").write_text("name,emotion\na,sad\n")
    model = ["--describer", "model", "--config", "tiny", "--base", LLAMA, "--trained", minigpt]
    model += ["--eva-vit", REFERENCE / "eva_vit_tiny.pth", "--config.generate.max_new_tokens=9", "--config.lora.rank=8"]
    argv = ["annotate", videos, "--out", tmp_path / "out", "--label-file", tmp_path / "labels.csv", "--workers", 1]
    assert cli.main([*map(str, [*argv, *model, "--describe", "picture,fine"])]) == 0
    (one,) = map(json.loads, (tmp_path / "out/annotations.jsonl").read_text().splitlines())
    assert one["describers"]["picture"] == "MiniGPT-v2 over llama" and one["describers"]["fine"] == "llama"
    assert one["picture"] in one["caption_coarse"] and one["caption_fine"]
    assert cli.main([*map(str, [*argv, *model, "--describe", "voice"])]) == 2
    assert "hears nothing; leave voice out" in capsys.readouterr().err

"""Texts and small tokenizers that the tests of tokenizers share."""

import json
from pathlib import Path

import tokenizers as hf
from tokenizers import decoders, models, pre_tokenizers, trainers

from emollama_jax.text.tokenizers import HFTokenizer

LLAMA = Path(__file__).parents[1] / "data" / "reference_tiny" / "llama"
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"

PLAIN_TEXTS = [
    "",
    " ",
    "   ",
    "the person in the video says",
    " sad",
    "   three spaces first",
    "trailing spaces  ",
    "two  spaces   inside",
    "\ttab\there",
    "line\nbreak\n\n\r\n end\n",
    "\"quoted\" and 'single', don't, I'LL, they've",
    "12345 and 3.14 or 1,000,000 ²Ⅷ٣",
    "你好，世界。情感识别",
    "😀 smiles 👩‍👩‍👧 and 🏳️‍🌈",
    "é ñ e\u0301 Ω Привет مرحبا",
    "control \x00\x01\x7f characters",
    "non-breaking\u00a0and wide\u3000spaces\u200b",
    "[INST] <video> <feature> [/INST] *** {'a': [1]} ###",
    "word " * 30,
]
SPECIAL_TEXTS = {
    "llama": [
        "</s>",
        " sad</s>",
        "<s>[INST] hi [/INST]",
        "a</s>b",
        "<unk> x <s></s> y\n</s> ",
        "</s",
        "<s><s>",
        "</s>\t",
    ],
    "bpe": [
        "<|im_end|>",
        "<|im_start|>user\nHi<|im_end|>\n",
        "a<|im_end|> b",
        " <|endoftext|> ",
        "<|im_end",
        "<|im_<|im_end|>",
    ],
}


def assert_same(one, other, texts):
    """Two tokenizers are the same in all that their interface shows."""
    for name in ("vocab_size", "bos_id", "eos_id", "pad_id", "chat_template"):
        assert getattr(one, name) == getattr(other, name), name
    for text in texts:
        for specials in (True, False):
            ids = one.encode(text, specials=specials)
            assert ids == other.encode(text, specials=specials), text
            for skip in (True, False):
                assert one.decode(ids, skip_specials=skip) == other.decode(ids, skip_specials=skip), text


def words(pre):
    """The pre-tokenizers the GGUF names stand for, put together anew."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    return gpt2


def train(pre="smollm"):
    tokenizer = hf.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = words(pre)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    # With `<|` among the merges, a special token spelled out must not be cut just anywhere.
    tokenizer.train_from_iterator([*PLAIN_TEXTS, "<| |> <|im |>"] * 3, trainer)
    tokenizer.add_tokens([hf.AddedToken("<video>", normalized=False)])
    return tokenizer


def make(tokenizer, **changes):
    names = {"bos": "<|im_start|>", "eos": "<|im_end|>", "pad": "<|endoftext|>", "chat_template": TEMPLATE}
    return HFTokenizer(tokenizer.to_str(), **{**names, **changes})


def write(file, value):
    file.write_text(json.dumps(value), encoding="utf-8")


def message(error):
    text = str(error.value)
    assert "\n" not in text and "; " in text, text
    return text

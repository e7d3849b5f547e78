"""The tokenizer of the tiny reference with tokens behind it, as transformers writes them."""

import json
import shutil
from pathlib import Path

LLAMA = Path(__file__).parents[1] / "data" / "reference_tiny" / "llama"
ADDED = {"<|im_start|>": 640, "[PAD]": 641, "<|im_end|>": 642, "<face>": 643, "<clip>": 644}


def flags(content, **changes):
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False} | changes


def write(folder, *, form="decoder", **changes):
    """The reference's tokenizer with ADDED behind it, ChatML's end as EOS; <clip> takes the spaces around it away."""
    folder.mkdir(exist_ok=True)
    shutil.copy(LLAMA / "tokenizer.model", folder)
    config = json.loads((LLAMA / "tokenizer_config.json").read_text())
    config |= {"eos_token": "<|im_end|>", "pad_token": "[PAD]", "additional_special_tokens": ["<|im_start|>"]}
    if form == "decoder":
        strips = {"<clip>": {"lstrip": True, "rstrip": True}}
        config["added_tokens_decoder"] |= {
            str(i): flags(t, special="<" not in t or "|" in t, **strips.get(t, {})) for t, i in ADDED.items()
        }
    else:
        del config["added_tokens_decoder"]
        (folder / "added_tokens.json").write_text(json.dumps(ADDED))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | changes))
    return folder

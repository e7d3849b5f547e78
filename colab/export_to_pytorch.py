# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     gpuType: T4
#     provenance: []
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Emotion-LLaMA: from a run to PyTorch
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/emollama_jax/blob/main/colab/export_to_pytorch.ipynb)
#
# A run becomes an adapter of PEFT with its projectors. transformers and peft, those of this notebook, load it, are asked
# about a clip, and answer as JAX does, token by token. Then the file of the original code, and the Hugging Face hub.
#
# - **small** takes the run of `finetune.ipynb`, or makes one of `DRAWN` clips in `STEPS` steps, and works on any runtime.
# - **7B** takes a run of the 7B model from your Drive. In float16 it is 13.5 GB in PyTorch: take an L4 or A100.

# %%
# @title Choose
MODEL = "small"  # @param ["small", "7B"]
RUN = ""  # @param {type:"string"}
DATA = ""  # @param {type:"string"}
DRAWN = 90  # @param {type:"integer"}
STEPS = 70  # @param {type:"integer"}
USE_DRIVE = False  # @param {type:"boolean"}
REPOSITORY = ""  # @param {type:"string"}
PYTHON = "3.12"  # @param ["3.12", "3.13", "3.11"]
SOURCE = "git+https://github.com/OWNER/emollama_jax"  # @param {type:"string"}

# %% [markdown]
# ## This machine

# %%
import os
import sys
from pathlib import Path

FACE, ENV = Path("emollama_face").resolve(), Path("emollama_env").resolve()
of_source = f" @ {SOURCE}" if SOURCE else ""
# !{sys.executable} -m pip install --quiet uv
# !{sys.executable} -m uv pip install --quiet --no-deps --target "{FACE}" "emollama_jax{of_source}"
sys.path.insert(0, str(FACE))
from emollama_jax import notebook

machine = notebook.check_machine(MODEL)

# %% [markdown]
# ## Install
#
# The environment gets PyTorch for the processor, to write `.pth` files; the notebook's own PyTorch is left as it is.

# %%
notebook.stop_on_errors()
TORCH = "--torch-backend cpu"  # @param ["--torch-backend cpu", ""]
extras = ",".join(filter(None, ["media", "convert", machine.extra]))
# !{sys.executable} -m uv venv --quiet --seed --allow-existing --python {PYTHON} "{ENV}"
# !{sys.executable} -m uv pip install --quiet {TORCH} --python "{ENV}" "emollama_jax[{extras}]{of_source}"
os.environ["PATH"] = f"{ENV / 'bin'}{os.pathsep}{os.environ['PATH']}"
# !emollama --version

# %%
# !{sys.executable} -m pip install --quiet "torch>=2.6" "transformers>=4.57.6,<6" "peft>=0.17" "safetensors>=0.8,<0.9"

# %% [markdown]
# ## The run

# %%
DRIVE = notebook.mount_drive() if USE_DRIVE else None
if MODEL == "small":
    made = [path for path in ("runs/finetune", "runs/small") if Path(path).exists()]
    RUN = RUN or (made[0] if made else str(notebook.make_small_run(clips=DRAWN, steps=STEPS)))
    DATA = DATA or "data/clips/image_tokens/1.0.0:test"
    BASE, HF = "weights/smollm2", "smollm2-hf"
    if not Path(HF).exists():
        # !emollama convert {BASE} {HF} --to hf --dtype float32
        pass
else:
    RUN = RUN or f"{DRIVE or '.'}/runs/finetune"
    DATA = DATA or "own/clips/image_tokens/1.0.0:test"
    BASE, HF = "weights/llama2", "weights/Llama-2-7b-chat-hf"
    notebook.use_secret("HF_TOKEN")
    # !emollama fetch llama2 --convert int8 --keep
print(RUN, DATA)

# %% [markdown]
# ## Export

# %%
# !rm -rf adapter checkpoint.pth
# !emollama export {RUN} adapter --to peft
# !emollama export {RUN} checkpoint.pth --to pth

# %% [markdown]
# ## What JAX answers
#
# A prompt is text and soft tokens: the projected outputs of the encoders. The file written here holds the encoders'
# outputs of one clip, the tokens of its prompt, and JAX's answer.

# %%
# %%writefile ask_jax.py
import sys

import numpy as np

from emollama_jax import Engine
from emollama_jax.data.records import open_split
from emollama_jax.infer.clip_input import ClipInput
from emollama_jax.text.prompts import Turn

run, data, base, question, out = sys.argv[1:]
records = open_split(data)
clip = ClipInput.of_record(records[0])
engine = Engine.load(run, base=base, inputs="image_tokens")
prompt = engine.predictor.prompt(clip, [Turn(question)])
answer = engine.ask(clip, question).answer
print(answer)
arrays = {"tokens": prompt.tokens, "soft": prompt.soft, "image": clip.image_tokens, "features": clip.features}
np.savez(out, **arrays, answer=answer, limit=engine.config.generate.max_new_tokens)

# %%
QUESTION = "[reason_v2] What do you notice?"  # @param {type:"string"}
# !python ask_jax.py {RUN} {DATA} {BASE} "{QUESTION}" asked.npz

# %% [markdown]
# ## What PyTorch answers

# %%
import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.float32 if MODEL == "small" else torch.float16
tokenizer = AutoTokenizer.from_pretrained(HF)
model = AutoModelForCausalLM.from_pretrained(HF, dtype=dtype).to(device)
model = PeftModel.from_pretrained(model, "adapter").eval()
projectors = {name: value.to(device, dtype) for name, value in load_file("adapter/projectors.safetensors").items()}


def project(name, x):
    return torch.nn.functional.linear(x, projectors[f"{name}.weight"], projectors[f"{name}.bias"])


asked = np.load("asked.npz")
image, features = (torch.tensor(asked[name], dtype=dtype, device=device) for name in ("image", "features"))
patches = image[1:].reshape(-1, projectors["llama_proj.weight"].shape[1])
soft = torch.cat(
    [
        project("llama_proj", patches),
        project("feats_llama_proj1", features[:1]),
        project("feats_llama_proj2", features[1:2]),
        project("feats_llama_proj3", features[2:]),
        project("cls_tk_llama_proj", image[:1]),
    ]
)
tokens, which = (torch.tensor(asked[name], dtype=torch.long, device=device) for name in ("tokens", "soft"))
embedded = torch.where((which >= 0)[:, None], soft[which.clamp(min=0)], model.get_input_embeddings()(tokens))
with torch.no_grad():
    out = model.generate(
        inputs_embeds=embedded[None],
        attention_mask=torch.ones_like(tokens)[None],
        max_new_tokens=int(asked["limit"]),
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
answer = tokenizer.decode(out[0], skip_special_tokens=True).strip()
print(answer)

# %%
print("JAX:    ", asked["answer"])
print("PyTorch:", answer)
assert MODEL != "small" or answer == str(asked["answer"]), "the answers differ"

# %% [markdown]
# Where the base is int8 in JAX and float16 here, as with the 7B model, the two may part at some word; the small model is
# float32 in both, and the cell above ends with an error if they do.
#
# ## The original code
#
# `checkpoint.pth` is what the original code's `ckpt` names.

# %%
state = torch.load("checkpoint.pth", weights_only=True, map_location="cpu")["model"]
print(len(state), "tensors, such as", next(iter(state)))

# %% [markdown]
# ## The hub
#
# With `REPOSITORY` as `USER/NAME` the adapter is pushed, as a private model with a card. It needs a token that may write,
# as the secret `HF_TOKEN`.

# %%
if REPOSITORY:
    notebook.use_secret("HF_TOKEN")
    # !emollama export {RUN} hf://{REPOSITORY} --to peft --yes
    pass

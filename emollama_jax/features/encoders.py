"""The encoders of a clip together: loaded, named by fingerprints, and run over the clips of a batch.

Axes: N clips, F faces, D feature size, T tokens of an image.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Bool, Float

from emollama_jax.config import Config
from emollama_jax.errors import UserError
from emollama_jax.features.encode import encode_audio, encode_images
from emollama_jax.fields import fields_affecting
from emollama_jax.io.paths import PathLike
from emollama_jax.media.clip import ClipMedia, ReadSpec
from emollama_jax.media.face_detection import detector_name
from emollama_jax.media.face_mesh import mesh_identity
from emollama_jax.media.faces import main_face_rule
from emollama_jax.models.eva_vit import EvaVit
from emollama_jax.models.hubert import Hubert
from emollama_jax.models.mae import Mae
from emollama_jax.models.videomae import VideoMae
from emollama_jax.models.vit import EncoderConfig
from emollama_jax.sharding import make_mesh
from emollama_jax.text.prompts import FEATURES
from emollama_jax.weights.base_checkpoint import fingerprint_of
from emollama_jax.weights.encoders import ENCODERS, random_encoder
from emollama_jax.weights.engine import param_values
from emollama_jax.weights.eva_vit import load_eva_vit
from emollama_jax.weights.hubert import load_hubert
from emollama_jax.weights.mae import load_mae
from emollama_jax.weights.videomae import load_videomae


@dataclass(frozen=True)
class Encoders:
    """Those of a clip's features and its image; None where there is none, and the feature is not computed."""

    mae: Mae | None = None
    videomae: VideoMae | None = None
    hubert: Hubert | None = None
    eva_vit: EvaVit | None = None

    def read_spec(self, frame_size: int) -> ReadSpec:
        """Return what is to be read of a clip for them, and a frame of this size."""
        mae, videomae = (model and model.config for model in (self.mae, self.videomae))
        return ReadSpec(
            frame=frame_size,
            face=mae and mae.image_size,
            motion=videomae and (videomae.num_frames, videomae.image_size),
            sound=self.hubert is not None,
        )

    def check_sizes(self, config: Config) -> None:
        """Raises UserError where an encoder's features are not of the size that the model takes."""
        expected = config.projectors.feature_size
        for name in FEATURES:
            model = getattr(self, name)
            if model is not None and (size := model.config.hidden_size) != expected:
                raise UserError(
                    f"weights.{name}: its features have {size} numbers, the model takes {expected} "
                    "(config.projectors.feature_size); give the encoder that it was trained with"
                )

    def fingerprints(self, config: Config) -> dict[str, str]:
        """What the numbers of each encoder that is there depend on: its parameters, and how clips are read for it."""
        clip = config.clip
        meshed = {"mesh": mesh_identity(clip.mesh)} if clip.mesh else {}
        options = {
            "mae": lambda model: {
                "pool": model.config.pool,
                "faces": detector_name(),
                "main_face": main_face_rule(mesh=bool(clip.mesh), person=clip.person),
                "max_faces": clip.max_faces,
                **meshed,
            },
            "videomae": lambda model: {"frames": model.config.num_frames, "pool": "mean"},
            "hubert": lambda model: {"layer": model.config.layer, "pool": "mean"},
            "eva_vit": lambda model: {},
        }
        found = {}
        for name, model in ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self)):
            if model is not None:
                named = [f"{key}={value}" for key, value in options[name](model).items()]
                found[name] = ", ".join([fingerprint_of(param_values(nnx.state(model))), *named])
        return found

    def features(
        self,
        clips: Sequence[ClipMedia],
        size: int,
        batch_size: int = 32,
        clock: Callable[[str, float], None] = lambda name, seconds: None,
        sizes: Sequence[int] = (),
    ) -> tuple[Float[np.ndarray, "N 3 D"], Bool[np.ndarray, "N 3"]]:
        """The clips' features in the order MAE, VideoMAE, HuBERT, and which of them there are; zeros elsewhere.

        A clip's do not depend on the others.

        Args:
            size: D of the records; the encoders must have it.
            batch_size: images, or seconds of sound divided by two, that are on the devices at once.
            clock: is told the seconds each encoder takes.
            sizes: of batches, where they are few and fixed: see `encode_images`.
        """
        features = np.zeros((len(clips), len(FEATURES), size), np.float32)
        has = np.zeros((len(clips), len(FEATURES)), bool)
        for column, (name, compute) in enumerate(
            (("mae", self._faces), ("videomae", self._motion), ("hubert", self._voices))
        ):
            start = time.perf_counter()
            if getattr(self, name) is not None:
                compute(clips, batch_size, sizes, features[:, column], has[:, column])
            clock(name, time.perf_counter() - start)
        return features, has

    def image_tokens(self, clips: Sequence[ClipMedia], batch_size: int = 32) -> Float[np.ndarray, "N T D"]:
        """EVA-ViT's tokens of the clips' frames, `batch_size` divided by four of these on the devices at once."""
        frames = np.stack([clip.frame for clip in clips])
        return encode_images(self.eva_vit, frames, batch_size=max(1, batch_size // 4))

    def _faces(self, clips, batch_size, sizes, features, has):
        has[:] = [clip.faces is not None for clip in clips]
        if has.any():
            faces = [clip.faces for clip in clips if clip.faces is not None]
            vectors = encode_images(self.mae, np.concatenate(faces), batch_size=batch_size, sizes=sizes)
            ends = np.cumsum([len(crops) for crops in faces])[:-1]
            features[has] = [of_clip.mean(axis=0) for of_clip in np.split(vectors, ends)]

    def _motion(self, clips, batch_size, sizes, features, has):
        has[:] = [clip.motion is not None for clip in clips]
        if has.any():
            motion = np.stack([clip.motion for clip in clips if clip.motion is not None])
            features[has] = encode_images(self.videomae, motion, batch_size=max(1, batch_size // 4), sizes=sizes)

    def _voices(self, clips, batch_size, sizes, features, has):
        has[:] = [clip.waveform is not None for clip in clips]
        if has.any():
            waveforms = [clip.waveform for clip in clips if clip.waveform is not None]
            features[has] = encode_audio(self.hubert, waveforms, batch_seconds=2 * batch_size, sizes=sizes)


def local_mesh() -> Mesh:
    """All devices of this process, which share the rows of a batch and have the parameters each."""
    return make_mesh({"data": len(jax.local_devices())}, jax.local_devices())


def load_encoders(
    config: Config,
    *,
    mae: PathLike | None = None,
    videomae: PathLike | None = None,
    hubert: PathLike | None = None,
    eva_vit: PathLike | None = None,
    mesh: Mesh | None = None,
) -> Encoders:
    """The encoders in these files, run as the experiment says; architectures are the files' own.

    Raises:
        UserError: a file is not there, damaged, or of another architecture.
    """

    def settings(name: str, *further: str) -> dict[str, Any]:
        encoder = getattr(config, name)
        return {field: getattr(encoder, field) for field in (*fields_affecting(type(encoder), "execution"), *further)}

    return Encoders(
        mae=mae and load_mae(mae, mesh=mesh, **settings("mae", "pool"))[0],
        videomae=videomae and load_videomae(videomae, mesh=mesh, **settings("videomae"))[0],
        hubert=hubert and load_hubert(hubert, mesh=mesh, **settings("hubert", "layer"))[0],
        eva_vit=eva_vit and load_eva_vit(eva_vit, config.eva_vit, mesh=mesh)[0],
    )


def random_encoders(config: Config, *, eva_vit: bool = False, mesh: Mesh | None = None) -> Encoders:
    """Encoders that have learnt nothing, of the experiment's seed: for trials without any weights.

    They have the sizes in the experiment, but for the width of MAE, VideoMAE and HuBERT, which is that of the features
    that the model takes: so they fit any trained weights.

    Raises:
        UserError: an encoder cannot be as wide.
    """
    names = [name for name in ENCODERS if eva_vit or name != "eva_vit"]
    return Encoders(**{name: random_encoder(name, _settings(config, name), config.seed, mesh=mesh) for name in names})


def _settings(config: Config, name: str) -> EncoderConfig:
    """The settings of a random encoder."""
    settings, width = getattr(config, name), config.projectors.feature_size
    try:
        return dataclasses.replace(settings, hidden_size=width) if name in FEATURES else settings
    except ValueError as error:
        raise UserError(
            f"config.{name}: {error}, where its features are as wide as the model's (config.projectors.feature_size="
            f"{width}); choose sizes that fit"
        ) from error

"""The peer of extraction: a clip's three features by torch and transformers, one clip at a time, as scripts do it.

All frames are decoded by OpenCV, the sound by PyAV; faces are detected by our code, so that the rest is compared.

Axes: F faces, D feature size, I x J pixels, S samples.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from emollama_jax.bench.peer import torch_device, torch_encoder
from emollama_jax.config import Config
from emollama_jax.errors import UserError
from emollama_jax.media.audio import SAMPLE_RATE
from emollama_jax.media.container import import_av
from emollama_jax.media.faces import face_crops
from emollama_jax.media.images import even_indices
from emollama_jax.media.video import Video
from emollama_jax.models.vit import IMAGENET_MEAN, IMAGENET_STD
from emollama_jax.text.prompts import FEATURES

FACES_AT_ONCE = 32

Faces = Callable[[str | Path, Sequence[int]], UInt8[np.ndarray, "F I J 3"]]


def faces_of(path: str | Path, indices: Sequence[int]) -> UInt8[np.ndarray, "F I J 3"]:
    """The crops of the main face in these frames of a video."""
    with Video(path) as video:
        return face_crops(video, indices).crops


def torch_encoders(config: Config) -> dict[str, Any]:
    """MAE, VideoMAE and HuBERT of the experiment in torch, with random parameters of its seed.

    Ours with the same ones are `bench.encode.load_peer(config.mae, peers["mae"])` and so on.
    """
    return {name: torch_encoder(getattr(config, name), config.seed) for name in FEATURES}


def extractor(
    config: Config, encoders: Mapping[str, Any], faces: Faces = faces_of
) -> Callable[[str | Path], tuple[Float[np.ndarray, "3 D"], dict[str, float]]]:
    """A function of a video's path that gives its features, and the seconds that `decode`, `face`, `sound` and
    `encoders` took.

    Features are float32 in the order MAE, VideoMAE, HuBERT; that of a clip without sound is zeros. The encoders are
    moved to the device, and to the compute dtype that the experiment gives each.

    Raises:
        UserError: by the function: the video cannot be decoded.
    """
    import torch
    import transformers

    device = torch_device()
    dtypes = {name: getattr(torch, getattr(config, name).compute_dtype) for name in FEATURES}
    models = {name: encoders[name].to(device, dtypes[name]).eval() for name in FEATURES}
    face, crop = ({"height": size, "width": size} for size in (config.mae.image_size, config.videomae.image_size))
    stats = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
    face_processor = transformers.ViTImageProcessor(size=face, **stats)
    clip_processor = transformers.VideoMAEImageProcessor(
        size={"shortest_edge": config.videomae.image_size}, crop_size=crop, **stats
    )
    sound_processor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=SAMPLE_RATE, do_normalize=True)

    def encode(name: str, inputs: np.ndarray, **further: Any) -> Any:
        return models[name](torch.from_numpy(inputs).to(device, dtypes[name]), **further)

    def mae(crops: np.ndarray) -> Any:
        first, last = (0, 1) if config.mae.pool == "cls" else (1, None)
        pooled = []
        for start in range(0, len(crops), FACES_AT_ONCE):
            batch = list(crops[start : start + FACES_AT_ONCE])
            pixels = face_processor(batch, return_tensors="np")["pixel_values"]
            noise = torch.zeros(len(batch), config.mae.grid**2, device=device)  # keeps the patches in their order
            tokens = encode("mae", pixels, noise=noise).last_hidden_state
            pooled.append(tokens[:, first:last].float().mean(dim=1))
        return torch.cat(pooled).mean(dim=0)

    def videomae(frames: Sequence[np.ndarray]) -> Any:
        shown = [frames[i] for i in even_indices(len(frames), config.videomae.num_frames)]
        pixels = clip_processor(shown, return_tensors="np")["pixel_values"]
        return encode("videomae", pixels).last_hidden_state.float().mean(dim=(0, 1))

    def hubert(samples: np.ndarray) -> Any:
        waveform = sound_processor(samples, sampling_rate=SAMPLE_RATE, return_tensors="np")["input_values"]
        states = encode("hubert", waveform, output_hidden_states=True).hidden_states
        return states[config.hubert.layer].float().mean(dim=(0, 1))

    @torch.inference_mode()
    def extract(path: str | Path) -> tuple[np.ndarray, dict[str, float]]:
        marks = [time.perf_counter()]
        frames = _frames(path)
        marks.append(time.perf_counter())
        crops = faces(path, even_indices(len(frames), min(config.clip.max_faces, len(frames))))
        marks.append(time.perf_counter())
        samples = _samples(path)
        marks.append(time.perf_counter())
        vectors = [mae(crops), videomae(frames), torch.zeros(config.hubert.hidden_size)]
        if len(samples):
            vectors[2] = hubert(samples)
        features = np.stack([vector.cpu().numpy() for vector in vectors])  # waits for the device
        marks.append(time.perf_counter())
        return features, dict(zip(("decode", "face", "sound", "encoders"), map(float, np.diff(marks)), strict=True))

    return extract


def _frames(path: str | Path) -> list[UInt8[np.ndarray, "I J 3"]]:
    import cv2

    capture, frames = cv2.VideoCapture(str(path)), []
    while (read := capture.read())[0]:
        frames.append(cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB))
    capture.release()
    if not frames:
        raise UserError(f"OpenCV decodes no frame: {path}; leave the clip out")
    return frames


def _samples(path: str | Path) -> Float[np.ndarray, " S"]:
    """The first audio stream at 16 kHz in mono; no samples without one."""
    av = import_av()
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return np.zeros(0, np.float32)
        resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)
        decoded = [part for frame in container.decode(audio=0) for part in resampler.resample(frame)]
        samples = np.concatenate([part.to_ndarray()[0] for part in [*decoded, *resampler.resample(None)]])
        stream = container.streams.audio[0]
        length = stream.duration and round(stream.duration * stream.time_base * SAMPLE_RATE)
        return samples[:length]  # without the codec's padding of the last packet

"""The encoders at full size, on a real photo, clip and voice, against torch's classes with the same random parameters.

They need about 10 GiB and some minutes, so they run only where EMOLLAMA_FULL_SIZE=1 is set:

    EMOLLAMA_FULL_SIZE=1 bash launch/test.sh tests/parity/test_encoders_full_size.py -n 0 -s
"""

import dataclasses
import os

import jax.numpy as jnp
import numpy as np
import pytest

from emollama_jax.bench.encode import load_peer
from emollama_jax.bench.peer import torch_encoder
from emollama_jax.config import Config
from emollama_jax.features.encode import encode_audio, encode_images
from emollama_jax.media.audio import hubert_waveform
from emollama_jax.media.images import eva_vit_frame, even_indices, mae_face, videomae_clip
from emollama_jax.models.eva_vit import CLIP_MEAN, CLIP_STD
from emollama_jax.models.vit import IMAGENET_MEAN, IMAGENET_STD, normalize
from emollama_jax.weights.encoders import ENCODERS

pytestmark = pytest.mark.skipif(
    os.environ.get("EMOLLAMA_FULL_SIZE") != "1", reason="10 GiB and minutes; EMOLLAMA_FULL_SIZE=1 runs it"
)
TOLERANCE = 1e-3


def prepared(name: str, real_media):
    """One clip as our encoder takes it."""
    if name == "eva_vit":
        return eva_vit_frame(real_media.stills[0])
    if name == "mae":
        return mae_face(real_media.stills[1])
    import av

    with av.open(str(real_media.clips[0])) as file:
        if name == "videomae":
            frames = [frame.to_image() for frame in file.decode(video=0)]
            return videomae_clip([frames[i] for i in even_indices(len(frames))])
        sound = np.concatenate([frame.to_ndarray() for frame in file.decode(audio=0)], axis=1)
        rate = file.streams.audio[0].rate
    return hubert_waveform(sound[:, : 3 * rate], rate)


@pytest.mark.parametrize("name", ENCODERS)
def test_full_size(name, real_media):
    torch = pytest.importorskip("torch")
    dtypes = dict.fromkeys(("kernel_dtype", "param_dtype", "compute_dtype"), "float32")
    config = dataclasses.replace(getattr(Config(), name), **dtypes)
    theirs = torch_encoder(config)
    ours = load_peer(config, theirs)
    x, further = prepared(name, real_media), {}
    if name == "hubert":
        found = encode_audio(ours, [x])
    else:
        found = encode_images(ours, x[None])
        stats = (CLIP_MEAN, CLIP_STD) if name == "eva_vit" else (IMAGENET_MEAN, IMAGENET_STD)
        x = np.moveaxis(np.asarray(normalize(jnp.asarray(x), *stats)), -1, -3)
        if name == "mae":
            further["noise"] = torch.zeros(1, config.grid**2)
    with torch.no_grad():
        tokens = theirs(torch.tensor(x[None]), **further).last_hidden_state.numpy()
    expected = {"eva_vit": tokens, "mae": tokens[:, 1:].mean(1)}.get(name, tokens.mean(1))
    error, largest = np.abs(found - expected).max(), np.abs(expected).max()
    in_norm = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    print(f"{name}: max error {error:.2e} of values up to {largest:.2f}; in norm {in_norm:.1e} relative")
    assert found.shape == expected.shape and error <= TOLERANCE

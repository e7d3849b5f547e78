"""The peer of extraction finds in a clip what we find, by other code and the same parameters."""

import dataclasses

import numpy as np
import pytest

from emollama_jax.bench.encode import load_peer
from emollama_jax.bench.extract_peer import extractor, faces_of, torch_encoders
from emollama_jax.config import load_config
from emollama_jax.errors import UserError
from emollama_jax.features.encode import encode_audio, encode_images
from emollama_jax.media.audio import hubert_waveform, read_sound
from emollama_jax.media.images import even_indices, mae_face, videomae_clip
from emollama_jax.media.video import Video
from emollama_jax.synthetic.dataset import make_dataset

for package in ("torch", "transformers", "cv2", "av"):
    pytest.importorskip(package)


def tiny(**changes):
    """The tiny experiment, in float32, few faces."""
    config = load_config("tiny")
    groups = {
        name: dataclasses.replace(getattr(config, name), kernel_dtype="float32", compute_dtype="float32", **further)
        for name, further in (("mae", changes), ("videomae", {}), ("hubert", {}))
    }
    return dataclasses.replace(config, clip=dataclasses.replace(config.clip, max_faces=5), **groups)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    made = make_dataset(tmp_path_factory.mktemp("clips") / "data", clips={"train": 2}, workers=1)
    return [made.video(clip) for clip in made.clips]


def our_features(paths, config, peers):
    mae, videomae, hubert = (load_peer(getattr(config, name), peers[name]) for name in ("mae", "videomae", "hubert"))
    faces, motion = [], []
    for path in paths:
        with Video(path) as video:
            shown = list(video.frames(even_indices(video.num_frames, config.videomae.num_frames)))
            crops = faces_of(path, even_indices(video.num_frames, config.clip.max_faces))
        motion.append(videomae_clip(shown, config.videomae.image_size))
        faces.append(np.stack([mae_face(crop, config.mae.image_size) for crop in crops]))
    by_face = np.split(encode_images(mae, np.concatenate(faces)), np.cumsum([len(crops) for crops in faces])[:-1])
    voices = encode_audio(hubert, [hubert_waveform(read_sound(path), 16000) for path in paths])
    vectors = np.stack([crops.mean(axis=0) for crops in by_face]), encode_images(videomae, np.stack(motion)), voices
    return np.stack(vectors, axis=1)


def test_features_agree_with_ours(videos):
    config = tiny()
    peers = torch_encoders(config)
    extract, ours = extractor(config, peers), our_features(videos, config, peers)
    theirs = []
    for path in videos:
        features, seconds = extract(path)
        assert features.shape == (3, config.mae.hidden_size) and features.dtype == np.float32
        assert list(seconds) == ["decode", "face", "sound", "encoders"] and min(seconds.values()) > 0
        theirs.append(features)
    differences = np.abs(np.stack(theirs) - ours).max(axis=(0, 2))
    print("largest differences:", differences)
    assert ours.shape == (2, 3, config.mae.hidden_size) and differences.max() <= 1e-4
    assert np.abs(theirs[0] - theirs[1]).max(axis=1).min() > 1e-3  # the clips are different, by every encoder


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_the_faces_can_be_given(videos, pool):
    config, asked = tiny(pool=pool), []

    def faces(path, indices):
        asked.append((path, list(indices)))
        return np.full((2, 60, 50, 3), 7, np.uint8)

    peers = torch_encoders(config)
    features, _ = extractor(config, peers, faces)(videos[0])
    with Video(videos[0]) as video:
        assert asked == [(videos[0], even_indices(video.num_frames, 5))]
    ours = encode_images(load_peer(config.mae, peers["mae"]), np.full((1, 32, 32, 3), 7, np.uint8))[0]
    assert features[0] == pytest.approx(ours, abs=1e-4)


def test_a_clip_without_sound_has_no_hubert_and_what_is_no_video_is_named(videos, tmp_path):
    import av

    with av.open(str(tmp_path / "silent.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", 10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 90, np.uint8), format="rgb24")
        file.mux([*stream.encode(frame), *stream.encode()])
    extract = extractor(tiny(), torch_encoders(tiny()))
    features, _ = extract(tmp_path / "silent.mp4")
    assert not features[2].any() and features[:2].any(axis=1).all()
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(UserError, match="OpenCV decodes no frame: .*text.mp4"):
        extract(tmp_path / "text.mp4")

"""The peak: of synthetic clips, whose peak is known, of faces moved by hand, and of OpenFace's files."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from emollama_jax.errors import UserError
from emollama_jax.media import faces as faces_module
from emollama_jax.media.face_detection import can_detect
from emollama_jax.media.faces import FaceCrops, face_crops
from emollama_jax.media.peak import motion_peak, openface_peak
from emollama_jax.media.video import Video
from emollama_jax.synthetic.dataset import make_dataset
from emollama_jax.synthetic.face import draw_face

needs_detector = pytest.mark.skipif(not can_detect(), reason="no face detector on this machine")


# From crops


def crops_of(frames, indices=None, found=None, source="centre"):
    crops = np.stack([np.asarray(Image.fromarray(frame).resize((112, 112))) for frame in frames])
    number = len(crops)
    indices = np.arange(number) if indices is None else np.array(indices)
    found = np.zeros(number, bool) if found is None else np.array(found)
    return FaceCrops(crops, indices, np.zeros((number, 4)), found, source, number)


def smiles(amounts):
    return [draw_face({"AU06": float(a), "AU12": float(a), "AU25": 0.8 * float(a)}) for a in amounts]


HILL = np.maximum(0, 1 - np.abs(np.arange(20) - 12) / 8)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    pytest.importorskip("av", reason="PyAV writes and reads the videos")
    made = make_dataset(tmp_path_factory.mktemp("made") / "up", clips={"train": 12}, seed=5, workers=1)
    return made, json.loads((made.root / "synthetic.json").read_text())["clips"]


def errors(made):
    data, truth = made
    result = []
    for clip in data.clips:
        with Video(data.video(clip)) as video:
            faces = face_crops(video, range(video.num_frames))
        result.append((abs(motion_peak(faces) - truth[clip.name]["peak_index"]), faces))
    return result


@pytest.mark.slow
@needs_detector
def test_the_peak_of_made_up_clips_is_found_from_their_faces(made):
    found = errors(made)
    assert all(faces.source == "face" and faces.found.all() for _, faces in found)
    assert sum(error <= 1 for error, _ in found) >= 11


def test_the_peak_of_made_up_clips_is_found_without_a_detector(made, monkeypatch):
    monkeypatch.setattr(faces_module, "can_detect", lambda: False)
    found = errors(made)
    assert all(faces.source == "undetected" for _, faces in found)
    assert sum(error <= 1 for error, _ in found) >= 11


def test_the_number_is_that_of_the_frame_in_the_clip():
    frames = smiles(HILL)
    assert motion_peak(crops_of(frames)) == 12
    assert motion_peak(crops_of(frames, indices=3 * np.arange(20) + 100)) == 136


def test_a_face_that_sways_and_a_light_that_changes_are_no_expression():
    sway = np.array([0, 1, 0, 2, 1, 0, -1, 0, 1, 0, 0, 1, 0, -1, 0, 1, 0, -1, 0, 1])
    light = 0.8 + 0.2 * np.cos(np.arange(20) * 0.7)
    frames = [
        (np.roll(frame, shift, axis=1) * gain).astype(np.uint8)
        for frame, shift, gain in zip(smiles(0.7 * HILL), sway, light, strict=True)
    ]
    assert abs(motion_peak(crops_of(frames)) - 12) <= 1


def test_interpolated_crops_are_not_the_peak():
    frames = smiles(HILL)
    frames[4:7] = [draw_face({"AU01": 1.0, "AU02": 1.0, "AU05": 1.0, "AU25": 1.0, "AU26": 1.0})] * 3
    assert motion_peak(crops_of(frames, found=np.abs(np.arange(20) - 5) > 1)) == 12
    assert motion_peak(crops_of(frames, found=np.ones(20, bool))) == 5


@needs_detector
def test_a_short_rest_before_a_long_smile_is_not_the_peak(real_clips):
    with Video(real_clips["single_face"]) as video:
        peak = motion_peak(face_crops(video, range(0, video.num_frames, 6)))
    assert 18 <= peak < 66  # he smiles from frame 18 on, and stops in the last frames


def test_one_frame_and_frames_that_are_all_alike_have_a_peak():
    assert motion_peak(crops_of(smiles([0.5]), indices=[7])) == 7
    assert motion_peak(crops_of(smiles([0.5] * 4))) in range(4)
    assert motion_peak(crops_of([np.full((60, 60, 3), 90, np.uint8)] * 3)) in range(3)


# From OpenFace's files


HEADER = "frame, face_id, timestamp, confidence, success, gaze_0_x, AU01_r, AU12_r, AU45_r, AU12_c"


def write_csv(path, rows, header=HEADER):
    """Rows of (frame, face, confidence, success, AU01, AU12, AU45)."""
    lines = [header]
    for frame, face, confidence, success, *aus in rows:
        values = ", ".join(f"{au:.2f}" for au in aus)
        lines.append(f"{frame}, {face}, {(frame - 1) / 25:.3f}, {confidence:.2f}, {success}, 9.0, {values}, 1")
    path.write_text("\n".join(lines) + "\n")
    return path


def calm(frame, face=0, confidence=0.98, success=1):
    return (frame, face, confidence, success, 0.1, 0.2, 0.0)


def test_the_largest_sum_wins_and_frames_count_from_0(tmp_path):
    rows = [calm(frame) for frame in range(1, 31)]
    rows[11] = (12, 0, 0.98, 1, 2.0, 1.0, 0.0)
    rows[20] = (21, 0, 0.98, 1, 2.5, 1.0, 0.0)
    assert openface_peak(write_csv(tmp_path / "a.csv", rows)) == 20
    zero_based = [(row[0] - 1, *row[1:]) for row in rows]
    assert openface_peak(write_csv(tmp_path / "b.csv", zero_based)) == 20


def test_a_single_spike_is_less_than_a_lasting_expression(tmp_path):
    rows = [calm(frame) for frame in range(1, 31)]
    rows[4] = (5, 0, 0.98, 1, 3.0, 0.3, 0.0)
    for frame in (19, 20, 21):
        rows[frame] = (frame + 1, 0, 0.98, 1, 1.5, 1.3, 0.0)
    assert openface_peak(write_csv(tmp_path / "a.csv", rows)) == 20


def test_failures_do_not_count_and_leave_the_numbers_of_the_others(tmp_path):
    rows = [calm(frame, success=int(frame > 5), confidence=0.9) for frame in range(1, 31)]
    rows[2] = (3, 0, 0.1, 0, 5.0, 5.0, 5.0)
    rows[15] = (16, 0, 0.9, 1, 1.0, 1.0, 0.0)
    assert openface_peak(write_csv(tmp_path / "a.csv", rows)) == 15


def test_of_several_faces_the_one_that_is_there_most(tmp_path):
    rows = []
    for frame in range(1, 31):
        rows.append(calm(frame, face=0) if frame != 9 else (9, 0, 0.98, 1, 1.0, 1.0, 0.0))
        if frame < 20:
            rows.append((frame, 1, 0.99, 1, 3.0, 3.0, 0.0))
    assert openface_peak(write_csv(tmp_path / "a.csv", rows)) == 8
    surer = [(f, face, 0.6 + 0.3 * face, 1, au, 0.0, 0.0) for f in range(1, 9) for face, au in ((0, f), (1, -f))]
    assert openface_peak(write_csv(tmp_path / "b.csv", surer)) == 0


def test_a_file_without_face_id_or_blanks_is_read_too(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("frame,timestamp,confidence,success,AU01_r\n1,0.0,0.9,1,0.5\n2,0.04,0.9,1,2.5\n3,0.08,0.9,1,0.1\n")
    assert openface_peak(path) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no columns frame and AU01_r"),
        ("frame,AU01_c\n1,0\n", "has no columns frame and AU01_r"),
        ("frame,success,AU01_r\n1,0,2.0\n2,0,1.0\n", "no frame with a face"),
        ("frame,success,AU01_r\n", "no frame with a face"),
        ("frame,success,AU01_r\n1,1,2.0\n2,1,much\n", "line 3: not a row of numbers"),
        ("frame,success,AU01_r\n1,1\n", "line 2: not a row of numbers"),
        ("frame,success,AU01_r\nnan,1,1.0\n", "line 2: not a row of numbers"),
        ("frame,success,AU01_r\n1,1,nan\n", "no frame with a face"),
    ],
)
def test_what_is_no_file_of_openface_says_so_in_a_line(tmp_path, text, message):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(str(path)) + ".*" + message) as caught:
        openface_peak(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_bytes_that_are_no_text(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        openface_peak(tmp_path / "no.csv")
    (tmp_path / "a.csv").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match="cannot be read as CSV"):
        openface_peak(tmp_path / "a.csv")

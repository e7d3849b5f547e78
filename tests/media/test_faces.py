"""The main face: which one it is among several, what happens where it is not found, and that crops are upright."""

import numpy as np
import pytest
from PIL import Image

from emollama_jax.errors import UserError
from emollama_jax.media import faces as module
from emollama_jax.media.face_detection import Faces, can_detect, detect_faces
from emollama_jax.media.face_mesh import Mesh
from emollama_jax.media.faces import (
    MAX_GAP_S,
    TEMPLATE,
    centre_square,
    cut_out,
    cuts,
    face_crops,
    main_track,
    similarity,
    smooth,
    steady,
    thumbnail,
)
from emollama_jax.media.images import to_rgb
from emollama_jax.media.video import Video

needs_detector = pytest.mark.skipif(not can_detect(), reason="no face detector on this machine")
FPS = 25


def faces_of(*found):
    """Detections of one frame from (x, y, side, score)."""
    boxes = np.array([(x, y, side, side) for x, y, side, _ in found], np.float64).reshape(-1, 4)
    landmarks = boxes[:, None, :2] + boxes[:, None, 2:] * TEMPLATE
    return Faces(boxes, landmarks, np.array([score for *_, score in found], np.float64))


def mesh_of(i, presence):
    """A mesh that is another for each `i`."""
    return Mesh(
        np.random.default_rng(7).normal(128, 40, (478, 2)) + np.random.default_rng(i).normal(0, 2, (478, 2)), presence
    )


def track_of(frames, cut_at=(), fps=FPS, **options):
    frames = [faces_of(*found) for found in frames]
    new_shot = np.isin(np.arange(len(frames)), cut_at)
    return main_track(frames, np.arange(len(frames)) / fps, new_shot, **options)


def write_video(path, frames, fps=FPS):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", fps)
        stream.bit_rate = 4_000_000
        stream.height, stream.width = frames[0].shape[:2]
        for pixels in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())
    return path


# Which face


def test_what_is_no_face_is_not_the_main_one_however_large_and_sure():
    """An ear, which a mesh finds no face in; and without a face there is no track."""
    frames = [[(10, 20, 90, 0.85), (200, 30, 50, 0.92)]] * 20
    assert track_of(frames).boxes[0, 0] == 10
    meshes = {i: [mesh_of(i, 0.01), mesh_of(i, 0.99)] for i in (0, 5, 10, 15)}
    assert track_of(frames, meshes=meshes).boxes[0, 0] == 200
    assert track_of([found[:1] for found in frames], meshes=meshes) is None
    doubtful = {i: [mesh_of(i, 0.4), mesh_of(i, 1.0)] for i in (0, 10)}  # 8100 * .25 * .4 against 2500 * .32
    assert track_of(frames, meshes=doubtful).boxes[0, 0] == 10


def test_a_picture_on_the_wall_is_not_the_main_face_but_where_nobody_is():
    frames = [[(10, 20, 90, 0.95), (200, 30, 50, 0.9)]] * 20
    meshes = {i: [mesh_of(0, 1.0), mesh_of(i, 1.0)] for i in range(0, 20, 3)}
    assert track_of(frames).boxes[0, 0] == 10
    assert track_of(frames, meshes=meshes).boxes[0, 0] == 200
    assert track_of(frames, meshes=meshes, person=2).boxes[0, 0] == 10
    assert track_of([found[:1] for found in frames], meshes=meshes).boxes[0, 0] == 10


def test_another_person_can_be_asked_for():
    frames = [[(10, 20, 90, 0.9), (200, 30, 50, 0.9)]] * 10
    assert track_of(frames, person=2).boxes[0, 0] == 200
    with pytest.raises(UserError, match="no person 3 among the 2 faces"):
        track_of(frames, person=3)
    assert track_of([[]] * 3, person=2) is None


def test_a_face_that_moves_is_one_track():
    track = track_of([[(10 + 6 * i, 20 + i, 50, 0.9)] for i in range(20)])
    assert track.frames.tolist() == list(range(20)) and np.all(track.scores == 0.9)
    assert track.boxes[7].tolist() == [52, 27, 50, 50]


def test_a_large_second_face_that_comes_and_goes_is_not_mixed_in():
    frames = [[(20, 20, 60, 0.9)] + ([(150, 10, 80, 0.95)] if i % 7 == 3 else []) for i in range(40)]
    track = track_of(frames)
    assert track.frames.tolist() == list(range(40)) and np.all(track.boxes[:, 0] == 20)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_of_three_the_largest_over_the_clip_whatever_their_order(order):
    frames = []
    for i in range(30):
        three = [(10, 30, 40, 0.9), (100 + i % 3, 20, 60, 0.9), (220, 30, 50, 0.9)]
        frames.append([three[k] for k in np.roll(order, i)])
    track = track_of(frames)
    assert len(track.frames) == 30 and np.all(track.boxes[:, 2] == 60)


def test_a_face_that_is_sure_goes_before_a_larger_one_that_is_hardly_any():
    """As an ear of somebody seen from behind, beside a face."""
    track = track_of([[(150, 20, 60, 0.8), (20, 20, 52, 0.92)]] * 10)
    assert np.all(track.boxes[:, 2] == 52) and np.all(track.scores == 0.92)


def test_faces_that_cross_at_a_distance_keep_their_sizes():
    track = track_of([[(10 + 5 * i, 20, 60, 0.9), (160 - 5 * i, 20, 30, 0.9)] for i in range(31)])
    assert len(track.frames) == 31 and np.all(track.boxes[:, 2] == 60)


def test_equal_faces_give_the_first():
    track = track_of([[(200, 20, 50, 0.9), (20, 20, 50, 0.9)]] * 4)
    assert np.all(track.boxes[:, 0] == 200)


def test_a_short_gap_is_interpolated_and_marked():
    frames = [[(10 + 3 * i, 20, 50, 0.9)] if not 4 <= i < 9 else [] for i in range(15)]
    track = track_of(frames)
    assert track.frames.tolist() == list(range(15))
    assert np.flatnonzero(track.scores == 0).tolist() == [4, 5, 6, 7, 8]
    assert np.allclose(track.boxes[:, 0], 10 + 3 * np.arange(15))
    assert np.allclose(track.landmarks[6], faces_of((28, 20, 50, 1)).landmarks[0])


def test_after_a_long_gap_it_is_another_face():
    gap = round(MAX_GAP_S * FPS) + 1
    frames = [[(10, 20, 50, 0.9)]] * 8 + [[]] * gap + [[(10, 20, 50, 0.9)]] * 12
    assert track_of(frames).frames.tolist() == list(range(8 + gap, 20 + gap))


def test_neighbours_are_linked_also_where_few_frames_are_looked_at():
    assert len(track_of([[(10 + 5 * i, 20, 50, 0.9)] for i in range(6)], fps=1).frames) == 6


def test_a_jump_and_another_size_are_other_faces():
    jump = track_of([[(10, 20, 50, 0.9)]] * 5 + [[(60, 20, 50, 0.9)]] * 6)
    size = track_of([[(10, 20, 50, 0.9)]] * 20 + [[(10, 20, 90, 0.9)]] * 6)
    assert jump.frames.tolist() == list(range(5, 11))
    assert size.frames.tolist() == list(range(20))


def test_no_face_goes_on_through_a_cut():
    frames = [[(10, 20, 50, 0.9)]] * 12
    assert track_of(frames).frames.tolist() == list(range(12))
    assert track_of(frames, cut_at=[5]).frames.tolist() == list(range(5, 12))


def test_what_is_never_sure_is_no_face():
    assert track_of([[(10, 20, 50, 0.7)]] * 10) is None
    assert track_of([[]] * 10) is None
    assert len(track_of([[(10, 20, 50, 0.7)]] * 9 + [[(10, 20, 50, 0.9)]]).frames) == 10


def test_a_cut_is_seen_and_a_moving_head_is_none():
    rng = np.random.default_rng(0)
    scenes = [Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((320, 240)) for _ in range(2)]
    scenes = [np.array(scene) for scene in scenes]
    frames = [np.roll(scenes[i >= 5], 4 * i, axis=1) for i in range(10)]
    assert np.flatnonzero(cuts(np.stack([thumbnail(frame) for frame in frames]))).tolist() == [5]


# Upright crops


def turned(degrees, scale, x, y):
    """Where landmarks are for a face of the template, turned and scaled about the template's middle, at x, y."""
    middle = TEMPLATE.mean(axis=0)
    a = np.radians(degrees)
    return (TEMPLATE - middle) @ np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]]) * scale + (x, y)


def dots(landmarks, height, width, radius):
    """A picture with a bright dot at each landmark."""
    y, x = np.mgrid[:height, :width] + 0.5
    value = sum(np.exp(-0.5 * ((x - px) ** 2 + (y - py) ** 2) / radius**2) for px, py in landmarks)
    return np.repeat((255 * np.minimum(value, 1)).astype(np.uint8)[..., None], 3, axis=2)


@pytest.mark.parametrize("size", [224, 112])
@pytest.mark.parametrize(
    "face", [(0, 224, 300, 200), (25, 180, 320, 240), (-70, 300, 310, 250), (170, 150, 200, 300), (8, 620, 420, 400)]
)
def test_landmarks_come_to_lie_on_the_template(face, size):
    landmarks = turned(*face)
    picture = dots(landmarks, 800, 840, radius=0.03 * face[1])
    crop = cut_out(picture, similarity(landmarks[None])[0], size)[..., 0].astype(float)
    assert crop.shape == (size, size)
    y, x = np.mgrid[:size, :size] + 0.5
    for px, py in TEMPLATE * size:
        near = crop * ((x - px) ** 2 + (y - py) ** 2 < (0.07 * size) ** 2)
        assert abs((near * x).sum() / near.sum() - px) < 1 and abs((near * y).sum() / near.sum() - py) < 1


def test_the_movement_is_the_best_of_its_kind():
    rng = np.random.default_rng(1)
    landmarks = turned(10, 200, 300, 200) + rng.normal(0, 5, (5, 2))
    template = TEMPLATE @ [1, 1j] - (TEMPLATE @ [1, 1j]).mean()
    error = lambda to, turn: np.sum(np.abs(to + turn * template - landmarks @ [1, 1j]) ** 2)
    to, turn = similarity(landmarks[None])[0]
    best = error(to, turn)
    for step in (0.1, -0.1, 0.1j, -0.1j):
        assert error(to + step, turn) > best and error(to, turn + step) > best


def test_a_fine_pattern_turns_grey_and_not_into_waves():
    stripes = np.zeros((1200, 1200, 3), np.uint8)
    stripes[:, ::2] = 255
    crop = cut_out(stripes, similarity(turned(0, 1000, 600, 600)[None])[0], 224)
    assert np.abs(crop[20:-20, 20:-20].astype(int) - 127).max() <= 4


def test_beyond_the_frame_it_is_black():
    crop = cut_out(np.full((200, 200, 3), 255, np.uint8), similarity(turned(0, 200, 0, 100)[None])[0], 224)
    assert crop[112, :80].max() == 0 and crop[112, 140:].min() == 255


def test_a_landmark_that_trembles_does_not_move_the_crop_and_a_moving_head_does():
    rng = np.random.default_rng(2)
    times = np.arange(50) / FPS
    still = similarity(turned(5, 200, 300, 200) + rng.normal(0, 3, (50, 5, 2)))
    steadied = steady(still, times)
    assert np.abs(np.diff(steadied[:, 0])).mean() < 0.2 * np.abs(np.diff(still[:, 0])).mean()
    assert np.std(np.abs(steadied[:, 1])) < 0.4 * np.std(np.abs(still[:, 1]))
    moving = similarity(np.stack([turned(5, 200 + i, 100 + 7 * i, 200 - 2 * i) for i in range(50)]))
    assert np.allclose(smooth(moving, times, 0.1), moving) and np.abs(steady(moving, times) - moving).max() < 1e-6


def test_one_frame_is_not_changed_by_smoothing():
    movement = similarity(turned(5, 200, 300, 200)[None])
    assert np.allclose(steady(movement, np.zeros(1)), movement)


def test_landmarks_on_one_point_give_a_crop_and_no_error():
    assert cut_out(np.zeros((20, 20, 3), np.uint8), similarity(np.full((1, 5, 2), 4.0))[0], 32).shape == (32, 32, 3)


# Whole clips


@needs_detector
def test_eyes_of_acted_faces_are_level_and_in_their_place(real_stills):
    for name, path in real_stills.items():
        pixels = np.asarray(to_rgb(path))
        crop = cut_out(pixels, similarity(detect_faces(pixels).landmarks[:1])[0], 224)
        found = detect_faces(crop)
        assert len(found.scores) == 1 and found.scores[0] > 0.9
        off = found.landmarks[0] / 224 - TEMPLATE
        assert np.abs(off).max() < (0.07 if name != "disgust" else 0.2)  # seen from the side
        eyes = found.landmarks[0, 1] - found.landmarks[0, 0]
        assert abs(np.degrees(np.arctan2(eyes[1], eyes[0]))) < 8


@pytest.mark.slow
@needs_detector
def test_speakers_are_found_in_every_frame_and_cropped_upright(real_clips):
    for path in real_clips.values():
        with Video(path) as video:
            wanted = np.linspace(0, video.num_frames - 1, 8).astype(int)
            faces = face_crops(video, wanted.tolist())
        assert faces.source == "face" and faces.found.all() and faces.looked_for == 8
        assert faces.indices.tolist() == wanted.tolist() and faces.crops.shape == (8, 224, 224, 3)
        for crop in faces.crops:
            again = detect_faces(crop)
            assert np.abs(again.landmarks[0] / 224 - TEMPLATE).max() < 0.16 and again.scores[0] > 0.8


@needs_detector
def test_frames_without_the_face_give_no_crop(real_stills, tmp_path):
    person = np.array(to_rgb(real_stills["happy"]).resize((320, 320)))
    wall = np.full_like(person, 90)
    frames = [wall] * 20 + [person] * 6 + [wall] * 4
    with Video(write_video(tmp_path / "a.mp4", frames)) as video:
        faces = face_crops(video, range(30), size=64)
    assert faces.indices.tolist() == list(range(20, 26)) and faces.looked_for == 30
    assert faces.crops.shape == (6, 64, 64, 3) and faces.found.all() and faces.boxes.shape == (6, 4)


def test_a_clip_without_a_face_gives_the_middles_of_its_frames(tmp_path):
    frame = np.zeros((120, 200, 3), np.uint8)
    frame[:, 40:160] = (200, 60, 60)
    with Video(write_video(tmp_path / "a.mp4", [frame] * 5)) as video:
        faces = face_crops(video, [0, 2, 4])
    assert faces.source == ("centre" if can_detect() else "undetected")
    assert not faces.found.any() and faces.indices.tolist() == [0, 2, 4]
    assert faces.boxes.tolist() == [[40, 0, 120, 120]] * 3
    assert np.abs(faces.crops[:, 8:-8, 8:-8].astype(int) - (200, 60, 60)).max() < 12


@needs_detector
def test_without_a_detector_crops_are_the_middles_and_say_so(real_stills, tmp_path, monkeypatch):
    person = np.array(to_rgb(real_stills["happy"]).resize((320, 240)))
    path = write_video(tmp_path / "a.mp4", [person] * 3)
    with Video(path) as video:
        assert face_crops(video, [0]).source == "face"
        monkeypatch.setattr(module, "can_detect", lambda: False)
        faces = face_crops(video, [0])
    assert faces.source == "undetected" and faces.boxes.tolist() == [centre_square(240, 320).tolist()]


def test_no_indices_is_an_error_of_one_line(tmp_path):
    with Video(write_video(tmp_path / "a.mp4", [np.zeros((64, 64, 3), np.uint8)])) as video:
        with pytest.raises(UserError, match="^faces: no frames to look at; leave the clip out$"):
            face_crops(video, [])

"""The mesh of a face: what is a face, what its blendshapes tell, and that it finds faces by itself."""

import dataclasses
import zipfile

import numpy as np
import pytest
from PIL import Image

from emollama_jax.captions import picture as picture_module
from emollama_jax.captions.picture import describe_picture
from emollama_jax.errors import UserError
from emollama_jax.media import faces as faces_module
from emollama_jax.media.action_units import ACTIVE, read_action_units
from emollama_jax.media.clip import ClipConfig
from emollama_jax.media.face_detection import can_detect, detect_faces
from emollama_jax.media.face_mesh import BLENDSHAPES, CROP, FaceMesh, load_mesh, mesh_identity
from emollama_jax.media.faces import cut_out, face_crops, similarity
from emollama_jax.media.images import to_rgb
from emollama_jax.media.mesh_units import USABLE, above_baseline, measure_blendshapes
from emollama_jax.media.unit_rules import find_unit_peak, labels_out_of_reach
from emollama_jax.media.video import Video
from emollama_jax.synthetic.clip import peak_aus
from emollama_jax.synthetic.dataset import SEEN, make_dataset
from tests.media.test_action_units import BY_FACE
from tests.media.test_faces import write_video


@pytest.fixture(scope="module")
def mesh(face_landmarker):
    return load_mesh(face_landmarker)


def pixels_of(path):
    return np.asarray(to_rgb(path))


def crop_of(mesh, pixels):
    return cut_out(pixels, similarity(mesh.detect(pixels).landmarks[:1])[0], CROP)


@pytest.mark.smoke
def test_acted_faces_are_found_and_their_blendshapes_tell_what_they_show(mesh, real_stills):
    assert len(BLENDSHAPES) == 52 and list(BLENDSHAPES) == sorted(BLENDSHAPES)
    told = {}
    for label, path in real_stills.items():
        pixels = pixels_of(path)
        found = mesh.detect(pixels)
        assert len(found.scores) == 1 and found.scores[0] > 0.8
        (x, y, width, height), landmarks = found.boxes[0], found.landmarks[0]
        assert np.all((landmarks > (x, y)) & (landmarks < (x + width, y + height)))
        if can_detect():
            other = detect_faces(pixels)
            assert np.abs(landmarks - other.landmarks[0]).max() < 0.12 * height
        one = mesh.mesh(crop_of(mesh, pixels))
        assert one.presence > 0.95
        told[label] = dict(zip(BLENDSHAPES, mesh.blendshapes(one), strict=True))
    assert min(told["happy"][f"mouthSmile{side}"] for side in ("Left", "Right")) > 0.6
    assert all(told[label]["mouthSmileLeft"] < 0.2 for label in told if label != "happy")
    assert min(told["surprise"]["jawOpen"], told["surprise"]["browInnerUp"]) > 0.3


def test_what_is_no_face_has_no_presence(mesh, real_media, real_stills):
    """A thing, noise, and a face upside down, of which the mesh is not made."""
    thing = pixels_of(real_media.stills[0])
    noise = np.random.default_rng(0).integers(256, size=(CROP, CROP, 3)).astype(np.uint8)
    middle = cut_out(thing, np.array([complex(210, 144), 288]), CROP)
    turned = np.ascontiguousarray(crop_of(mesh, pixels_of(real_stills["happy"]))[::-1])
    assert max(mesh.mesh(crop).presence for crop in (noise, middle)) < 0.3
    assert mesh.mesh(turned).presence < 0.9
    assert len(mesh.detect(noise).scores) == 0


def test_several_faces_in_a_broad_picture_are_each_found_once(mesh, real_stills):
    pair = [np.asarray(Image.fromarray(pixels_of(path)).resize((256, 256))) for path in [*real_stills.values()][:2]]
    found = mesh.detect(np.concatenate(pair, axis=1))
    middles = sorted(found.boxes[:, 0] + found.boxes[:, 2] / 2)
    assert len(middles) == 2 and middles[0] < 256 < middles[1]


def test_faces_are_found_without_the_other_detector(mesh, real_stills, tmp_path, monkeypatch):
    """As on ARM."""
    small = np.asarray(Image.fromarray(pixels_of(real_stills["happy"])).resize((320, 320)))
    video = write_video(tmp_path / "a.mp4", [small] * 3)
    monkeypatch.setattr(faces_module, "can_detect", lambda: False)
    with Video(video) as opened:
        assert face_crops(opened, [0, 2]).source == "undetected"
        crops = face_crops(opened, [0, 2], mesh=mesh)
    assert crops.source == "face" and crops.found.all()
    monkeypatch.setattr(picture_module, "can_detect", lambda: False)
    assert describe_picture(small).endswith(" picture.") and describe_picture(small, mesh).startswith("One face in a ")


def test_a_clip_becomes_a_table_of_blendshapes_against_its_own_baseline(face_landmarker, real_stills, tmp_path):
    """A face that comes to smile, and a still, which has no baseline."""
    calm, happy = (
        np.asarray(Image.fromarray(pixels_of(real_stills[label])).resize((256, 256))) for label in ("angry", "happy")
    )
    config = ClipConfig(mesh=str(face_landmarker))
    frames = [happy if 7 <= i < 10 else calm for i in range(16)]
    result = measure_blendshapes(write_video(tmp_path / "a.mp4", frames), config)
    (tmp_path / "a.csv").write_text(result["csv"])
    table = read_action_units(tmp_path / "a.csv")
    assert (table.source, table.units, len(table.frames)) == ("blendshapes", BLENDSHAPES, 16) and table.found.all()
    own = above_baseline(table)
    assert own.units == USABLE and own.intensity[0].max() < 0.1
    peak = find_unit_peak(own, frame=8)
    assert peak.label == "happy" and {*peak.active} <= {*USABLE}
    assert find_unit_peak(own, frame=0) is None
    assert "angry" in labels_out_of_reach(own) and not {"happy", "surprise"} & {*labels_out_of_reach(own)}
    still = measure_blendshapes(write_video(tmp_path / "b.mp4", [happy]), config)
    (tmp_path / "b.csv").write_text(still["csv"])
    assert still["peak_index"] == 0
    assert find_unit_peak(above_baseline(read_action_units(tmp_path / "b.csv")), frame=0).label == "happy"
    nothing = measure_blendshapes(write_video(tmp_path / "c.mp4", [np.zeros((64, 64, 3), np.uint8)] * 3), config)
    assert nothing["peak_index"] is None
    broken = tmp_path / "d.mp4"
    broken.write_bytes(b"no video")
    assert isinstance(measure_blendshapes(broken, config), UserError)
    several = dataclasses.replace(config, person=2)
    assert "person 2" in str(measure_blendshapes(tmp_path / "a.mp4", several))


def test_a_bundle_that_is_none_is_one_line(face_landmarker, tmp_path):
    with pytest.raises(UserError, match="emollama fetch face-landmarker brings it"):
        FaceMesh(tmp_path / "none.task")
    with pytest.raises(UserError, match="emollama fetch face-landmarker brings it"):
        mesh_identity(tmp_path / "none.task")
    (tmp_path / "a.task").write_bytes(face_landmarker.read_bytes()[:1000])
    with zipfile.ZipFile(tmp_path / "b.task", "w") as other:
        other.writestr("face_detector.tflite", b"no network")
    for name in ("a", "b"):
        with pytest.raises(UserError, match="not MediaPipe's face landmarker"):
            FaceMesh(tmp_path / f"{name}.task")


SEEN_AS = {"AU01": "browInnerUp", "AU02": "browOuterUpLeft", "AU12": "mouthSmileLeft", "AU26": "jawOpen"}


@pytest.mark.slow
def test_peaks_and_labels_of_drawn_faces_by_blendshapes(face_landmarker, tmp_path):
    """A drawn face is none that the networks know: the peak is found all the same, and labels are few but right."""
    made = make_dataset(tmp_path / "made", clips={"train": 9}, seed=3, people=3, workers=1)
    config = ClipConfig(mesh=str(face_landmarker))
    near, told, right, hits, claimed, true = 0, 0, 0, 0, 0, 0
    for spec in made.clips:
        found = measure_blendshapes(made.video(spec), config)
        (tmp_path / "a.csv").write_text(found["csv"])
        table = above_baseline(read_action_units(tmp_path / "a.csv"))
        near += abs(found["peak_index"] - spec.peak_index) <= 1
        peak = find_unit_peak(table, frame=found["peak_index"])
        if peak is not None:
            told, right = told + 1, right + (peak.label == BY_FACE.get(spec.factors.face))
        row = table.intensity[table.frames == found["peak_index"]][0]
        active = {unit for unit, name in SEEN_AS.items() if row[table.units.index(name)] >= ACTIVE}
        seen = {unit for unit, value in peak_aus(spec).items() if value >= SEEN} & {*SEEN_AS}
        hits, claimed, true = hits + len(seen & active), claimed + len(active), true + len(seen)
    print(
        f"blendshapes: peak within a frame {near}/9, labelled {told}/9, right {right}/{told}, "
        f"units' F1 {2 * hits / max(claimed + true, 1):.3f}"
    )
    assert near >= 8

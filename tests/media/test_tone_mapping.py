"""Pictures of high dynamic range come as they are seen on a usual screen."""

from fractions import Fraction

import numpy as np
import pytest

from tests.media.hostile import one_frame

av = pytest.importorskip("av")


@pytest.mark.parametrize(("transfer", "white", "grey"), [(16, 0.58, 0.40), (18, 0.75, 0.5)])
def test_high_dynamic_range_is_shown_as_on_a_usual_screen(tmp_path, transfer, white, grey):
    """Diffuse white (203 cd/m2 by BT.2408) and half of that signal; BT.2020's green is BT.709's at its brightest."""
    signal = np.zeros((32, 48, 3))
    signal[:, :16], signal[:, 16:32], signal[:, 32:] = white, grey, (0, grey, 0)
    path = write_hdr(tmp_path / "a.mkv", signal, transfer)
    found = one_frame(path)[16, [8, 24, 40]].astype(int)
    assert found[0] == pytest.approx([230] * 3, abs=3)  # lowered a little, for what is brighter
    expected = [255 * (light / 203) ** (1 / 2.4) for light in {16: (32.4,), 18: (50.7,)}[transfer]]
    assert found[1] == pytest.approx(expected * 3, abs=3)
    assert found[2][0] == found[2][2] == 0 and found[2][1] > found[1][1] * 0.9


def write_hdr(path, signal, transfer):
    """One frame of this RGB signal in BT.2020, 10 bits."""
    y = signal @ [0.2627, 0.6780, 0.0593]
    planes = [219 * y + 16, 224 * (signal[..., 2] - y) / 1.8814 + 128, 224 * (signal[..., 0] - y) / 1.4746 + 128]
    frame = av.VideoFrame(signal.shape[1], signal.shape[0], "yuv444p10le")
    for plane, values in zip(frame.planes, planes, strict=True):
        samples = np.zeros((plane.height, plane.line_size // 2), np.uint16)
        samples[:, : plane.width] = np.rint(4 * values)
        plane.update(samples.tobytes())
    with av.open(str(path), "w") as file:
        stream = file.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, frame.format.name
        for tagged in (stream.codec_context, frame):
            tagged.color_trc, tagged.colorspace, tagged.color_primaries, tagged.color_range = transfer, 9, 9, 1
        frame.pts, frame.time_base = 0, Fraction(1, 25)
        file.mux([*stream.encode(frame), *stream.encode(None)])
    return path

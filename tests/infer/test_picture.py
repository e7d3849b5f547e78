"""The picture of an answer."""

import warnings

import numpy as np
import pytest

from emollama_jax.infer.picture import plot_answer

pytest.importorskip("matplotlib")
FRAME = np.full((8, 6, 3), (200, 100, 50), np.uint8)


def test_it_shows_the_frame_the_bars_and_the_words(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (drawn.append(self), save(self, *args, **kwargs))
    )
    probabilities = {"sad": 0.25, "happy": 0.7, "fear": 0.05}
    plot_answer(tmp_path / "answer.png", FRAME, probabilities, subtitle="It costs $5, or $6.", answer="word " * 40)
    (figure,) = drawn
    frame, bars = figure.axes
    np.testing.assert_array_equal(frame.images[0].get_array(), FRAME)
    assert [label.get_text() for label in bars.get_yticklabels()] == ["fear", "sad", "happy"]  # from the bottom
    assert [bar.get_width() for bar in bars.patches] == [0.05, 0.25, 0.7]
    assert [text.get_text() for text in bars.texts] == ["5%", "25%", "70%"]
    said, *answer = figure.get_supxlabel().splitlines()
    assert said == r"Said: It costs \$5, or \$6."
    assert len(answer) == 3 and " ".join(answer).count("word") == 40
    assert (tmp_path / "answer.png").read_bytes().startswith(b"\x89PNG")


def test_control_characters_are_written_out(tmp_path, monkeypatch):
    """No font has glyphs of theirs, which matplotlib warns of."""
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self.canvas.draw() or self))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said, answer = "Oh\x00no.\n\x07", "\x1b[31mred\x7f\u200b"
        plot_answer(tmp_path / "answer.png", FRAME, {"sad": 1.0}, subtitle=said, answer=answer)
    assert drawn[0].get_supxlabel().splitlines() == [r"Said: Oh\x00no. \x07", r"Answer: \x1b[31mred\x7f\u200b"]

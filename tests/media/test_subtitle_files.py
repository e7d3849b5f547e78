"""Which subtitle files belong to a video, and which of them is tried first."""

import unicodedata

import pytest

from emollama_jax.media.subtitle_files import find_subtitle_files, main_language


def found(folder, video, language=""):
    return [path.name for path in find_subtitle_files(folder / video, language)]


@pytest.fixture
def folder(tmp_path):
    own = ["srt", "mp4.vtt", "en-US.vtt", "EN.SRT", "zh-Hans.ass", "fr.srt", "eng.forced.srt"]
    others = ["clip.mp4", "clip.one.mp4", "clip.one.srt", "clip.Take 2.srt", "clip2.srt", "._clip.srt", "clip.ssa.txt"]
    for name in (*(f"clip.{name}" for name in own), *others):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.smoke
def test_languages_come_in_an_order_and_forced_ones_last(folder):
    expected = ["clip.srt", "clip.mp4.vtt", "clip.EN.SRT", "clip.en-US.vtt", "clip.zh-Hans.ass", "clip.fr.srt"]
    assert found(folder, "clip.mp4") == [*expected, "clip.eng.forced.srt"]
    assert found(folder, "clip.one.mp4") == ["clip.one.srt"]
    assert found(folder / "nowhere", "clip.mp4") == []


def test_the_language_that_is_asked_for_goes_first_and_others_are_left_out(folder):
    untagged = ["clip.srt", "clip.mp4.vtt"]
    assert found(folder, "clip.mp4", "zho") == ["clip.zh-Hans.ass", *untagged]
    assert found(folder, "clip.mp4", "en") == ["clip.EN.SRT", "clip.en-US.vtt", *untagged, "clip.eng.forced.srt"]
    assert found(folder, "clip.mp4", "de") == untagged


def test_names_are_the_same_composed_or_not_and_in_capitals(tmp_path):
    (tmp_path / unicodedata.normalize("NFD", "é.EN.Srt")).touch()
    (tmp_path / "B.srt").touch()
    assert len(found(tmp_path, "é.mp4")) == 1 and found(tmp_path, "b.mp4") == ["B.srt"]
    (tmp_path / "B.mp4").touch()
    assert found(tmp_path, "b.mp4") == []


@pytest.mark.parametrize(("tag", "language"), [("en-GB", "en"), ("chi", "zh"), ("German", "de"), ("und", ""), ("", "")])
def test_a_language_has_many_names(tag, language):
    assert main_language(tag) == language

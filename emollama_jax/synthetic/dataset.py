"""Writes the synthetic data set: short videos of drawn faces with synthesised speech-like sound, and subtitles.

Face, voice and words each leave three labels possible, two of them nearly always one, all three together always one:
see `synthetic/clip.py`.
"""

import csv
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

from emollama_jax.errors import UserError
from emollama_jax.io.atomic import atomic_folder, write_json
from emollama_jax.io.worker_pool import WorkerDied, default_workers, map_ahead
from emollama_jax.media.audio import SAMPLE_RATE
from emollama_jax.media.container import import_av
from emollama_jax.synthetic.clip import (
    FPS,
    VERSION,
    ClipSpec,
    clip_look,
    clip_sentence,
    clip_spec,
    peak_aus,
    render_clip,
)
from emollama_jax.synthetic.face import SIZE
from emollama_jax.synthetic.words import AU_WORDS, VOICES, coarse_caption, fine_caption
from emollama_jax.text.labels import MERR

CLIPS = MappingProxyType({"train": 180, "val": 36, "test": 36})
SEEN = 0.25  # the intensity from which an action unit is listed as seen
VALENCE = dict(zip(MERR, (3.0, -3.0, 0.0, -2.5, -1.5, 0.5, -3.5, -1.0, -0.5), strict=True))


@dataclass(frozen=True, slots=True)
class SyntheticDataset:
    """A data set on disk."""

    root: Path
    seed: int
    clips: tuple[ClipSpec, ...]
    """Of all splits, one split behind the other."""

    def video(self, clip: ClipSpec) -> Path:
        return self.root / "video" / f"{clip.name}.mp4"


def make_dataset(
    root: str | Path,
    *,
    clips: Mapping[str, int] = CLIPS,
    seed: int = 0,
    people: int | None = None,
    workers: int | None = None,
) -> SyntheticDataset:
    """Make the data set in a new folder, in the files of the reference: it appears complete or not at all.

        video/{name}.mp4                                H.264 (or MPEG-4) and AAC
        relative_{split}_NCEV.txt                       name frames emotion valence
        MERR_coarse_grained.txt, MERR_fine_grained.txt  name frames emotion; of `train`, the second of a part of it
        MERR_coarse_grained.json, ..._fine_grained.json what is seen, heard and said in these, and a caption
        transcription.csv                               name,sentence
        synthetic.json                                  how each clip was made: its factors, the true peak, its face

    Every clip depends on the seed, its split and its number alone: a larger data set begins with the smaller one.

    Args:
        root: the folder; absent or empty.
        clips: how many, by split. Labels occur equally often, to one.
        seed: another gives other clips.
        people: how many different people there are in all clips; None draws a new one for each clip. The fewer there
            are, the easier untrained encoders tell expressions from looks.
        workers: processes; 1 renders in this process, None uses all CPUs, or fewer for few clips.

    Raises:
        UserError: `root` is not empty or cannot be written to, PyAV is missing, or an argument is out of range.
    """
    import_av()
    for split, number in clips.items():
        if not split.isidentifier() or number < 0:
            raise UserError(f"clips: {number} of the split {split!r}; give 0 or more, and a plain word as the name")
    if seed < 0 or any(number is not None and number < 1 for number in (people, workers)):
        given = f"seed={seed}, people={people}, workers={workers}"
        raise UserError(f"{given}: the seed must be at least 0, people and workers at least 1")
    specs = [clip_spec(split, index, seed, people) for split, number in clips.items() for index in range(number)]
    with atomic_folder(root) as folder:
        (folder / "video").mkdir()
        _for_each(specs, partial(_write_video, folder / "video"), workers)
        _write_lists(folder, specs, list(clips))
        write_json(folder / "synthetic.json", _provenance(specs, seed, people))
    return SyntheticDataset(Path(root), seed, tuple(specs))


def _for_each(specs: list[ClipSpec], work: Callable[[ClipSpec], None], workers: int | None) -> None:
    if workers is None:  # starting a process takes as long as some clips
        workers = min(default_workers(), 1 + len(specs) // 32)
    for done in map_ahead(work, specs, 0 if workers == 1 else workers):
        if isinstance(done, WorkerDied):
            raise UserError(f"a process that made clips ended ({done}); give fewer workers, or free some memory")


def _write_video(folder: Path, spec: ClipSpec) -> None:
    av = import_av()
    frames, samples = render_clip(spec)
    with av.open(str(folder / f"{spec.name}.mp4"), "w") as file:
        options = {"threads": "1"}  # the clips are many and small
        if "libx264" in av.codecs_available:
            video = file.add_stream("libx264", FPS, options={**options, "preset": "ultrafast", "crf": "20"})
        else:
            video = file.add_stream("mpeg4", FPS, options=options)
            video.bit_rate = 600_000
        video.width, video.height, video.pix_fmt = SIZE, SIZE, "yuv420p"
        audio = file.add_stream("aac", SAMPLE_RATE, layout="mono")
        audio.bit_rate = 48_000
        for pixels in frames:
            file.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        sound = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        sound.sample_rate, sound.pts = SAMPLE_RATE, 0  # without a time stamp the encoder's delay would shift the sound
        file.mux(audio.encode(sound))
        for stream in (video, audio):
            file.mux(stream.encode())


def _write_lists(folder: Path, specs: list[ClipSpec], splits: list[str]) -> None:
    for split in splits:
        ncev = [f"{c.name} {c.num_frames} {c.label} {VALENCE[c.label]}" for c in specs if c.split == split]
        _write_lines(folder / f"relative_{split}_NCEV.txt", ncev)
    with (folder / "transcription.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["name", "sentence"])
        writer.writerows([spec.name, clip_sentence(spec)] for spec in specs)
    coarse = [spec for spec in specs if spec.split == "train"]
    fine = [spec for index, spec in enumerate(coarse) if has_fine_caption(spec, index)]
    for grain, described in (("coarse", coarse), ("fine", fine)):
        _write_lines(folder / f"MERR_{grain}_grained.txt", [f"{c.name} {c.num_frames} {c.label}" for c in described])
        write_json(folder / f"MERR_{grain}_grained.json", {spec.name: describe(spec, grain) for spec in described})


def has_fine_caption(spec: ClipSpec, index: int) -> bool:
    """Whether a training clip has a fine-grained caption: two in three do, of every label."""
    return (MERR.index(spec.label) + index // len(MERR)) % 3 != 2


def describe(spec: ClipSpec, grain: str) -> dict[str, object]:
    """A clip's entry in `MERR_{grain}_grained.json`."""
    aus = peak_aus(spec)
    seen = [au for au, value in aus.items() if value >= SEEN]
    said = clip_sentence(spec)
    if grain == "coarse":
        caption = {"caption": coarse_caption(*spec.factors)}
    else:
        caption = {"smp_reason_caption": fine_caption(*spec.factors, spec.label)}
    return {
        "AU_list": seen,
        "visual_prior_list": [AU_WORDS[au] for au in seen],
        "audio_prior_list": VOICES[spec.factors.voice],
        "peak_index": spec.peak_index,
        "peak_AU_list": sorted(seen, key=lambda au: -aus[au])[:3],
        "text": said,
        "pseu_emotion": spec.label,
        **caption,
    }


def _provenance(specs: list[ClipSpec], seed: int, people: int | None) -> dict[str, object]:
    clips = {}
    for spec in specs:
        look = clip_look(spec)
        clips[spec.name] = {
            **asdict(spec),
            "factors": spec.factors._asdict(),
            "peak_aus": {au: round(value, 4) for au, value in peak_aus(spec).items()},
            "head": [round(value, 2) for value in look.center],
            "face_box": list(look.box),
        }
    return {"version": VERSION, "seed": seed, "people": people, "fps": float(FPS), "size": SIZE, "clips": clips}


def _write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

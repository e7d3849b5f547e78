"""Benchmark of extraction, from video files to records with features, with the share of each kind of work."""

import dataclasses
import itertools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from etils import epath

from emollama_jax.bench.encode import load_peer, relative_difference
from emollama_jax.bench.extract_peer import extractor, torch_encoders
from emollama_jax.bench.peer import PEER, obstacle
from emollama_jax.bench.report import OURS, Figures, Measure, Report, alternate, check_one_device, with_dtype
from emollama_jax.config import Config, to_dict
from emollama_jax.data.annotations import Clip
from emollama_jax.data.parts import read_records
from emollama_jax.errors import UserError
from emollama_jax.features.encoders import Encoders
from emollama_jax.features.extract import extraction_part_maker, extraction_recipe
from emollama_jax.io.paths import as_path
from emollama_jax.io.worker_pool import default_workers
from emollama_jax.synthetic.dataset import make_dataset
from emollama_jax.text.labels import MERR
from emollama_jax.text.prompts import FEATURES
from emollama_jax.weights.encoders import random_encoder

KINDS = ("decode", "face", "sound", "encoders", *FEATURES)  # of work; the peer does not tell its encoders apart
COLUMNS = {"clips_per_s": "clips/s"} | {f"{kind}_percent": f"{kind} %" for kind in KINDS}


def bench_extract(
    config: Config,
    *,
    clips: int = 16,
    videos: Sequence[Path] = (),
    workers: int | None = None,
    batch_size: int = 32,
    dtype: str | None = None,
    repeats: int = 3,
    with_peer: bool = True,
) -> Report:
    """Extracts synthetic clips, or the given videos in turn, up to `clips` of them.

    Args:
        workers: processes that read clips, of ours; the peer does one clip after another. Default: the processors but
            one.
        dtype: of kernels and activations, in place of the experiment's; default: float32 on CPUs, the experiment's
            elsewhere.
    """
    check_one_device(config)
    if missing := [path for path in videos if not path.is_file()]:
        raise UserError(f"no such file: {missing[0]}; give videos")
    workers = max(1, default_workers() - 1) if workers is None else workers
    config = with_dtype(config, FEATURES, dtype)
    why_no_peer = obstacle("torch", "transformers", "cv2", wanted=with_peer)
    notes = [why_no_peer] if why_no_peer else []
    notes += ["%: of the seconds of all kinds of work together; ours are of several processes at once"]
    peers = None if why_no_peer else torch_encoders(config)
    sizes = {name: getattr(config, name).hidden_size for name in FEATURES}
    if len(set(sizes.values())) > 1:
        raise UserError(f"encoders of different sizes {sizes}; records hold one size")
    config = dataclasses.replace(
        config, projectors=dataclasses.replace(config.projectors, feature_size=sizes[FEATURES[0]])
    )
    encoders = {
        name: load_peer(getattr(config, name), peers[name])
        if peers
        else random_encoder(name, getattr(config, name), config.seed)
        for name in FEATURES
    }
    with tempfile.TemporaryDirectory() as folder:
        paths = list(itertools.islice(itertools.cycle(videos or _synthetic_videos(Path(folder), clips)), clips))
        ours = _ours(config, Encoders(**encoders), paths, as_path(folder), workers, batch_size)
        contenders = {OURS: ours, PEER: _peers(config, peers, paths) if peers else None}
        results = alternate(contenders, batch=batch_size, repeats=repeats)
    if peers:
        difference = relative_difference(*(result.output for result in results))
        notes.append(f"the features differ by {difference:.1e} of the largest")
    settings = {"clips": clips, "videos": len(videos) or "synthetic", "workers": workers, "repeats": repeats}
    return Report("Extraction, random weights", to_dict(config), settings, COLUMNS, results, notes)


def _synthetic_videos(folder: Path, clips: int) -> list[Path]:
    made = make_dataset(folder / "clips", clips={"train": clips}, workers=default_workers())
    return [made.video(clip) for clip in made.clips]


def _ours(
    config: Config, encoders: Encoders, paths: Sequence[Path], folder: epath.Path, workers: int, batch_size: int
) -> Measure:
    recipe = extraction_recipe(config, encoders, labels=MERR, frame_rule="middle")
    clips = [Clip(name=f"clip_{i}", split="train", video=path) for i, path in enumerate(paths)]

    def measure() -> tuple[Figures, np.ndarray]:
        make_parts = extraction_part_maker(config, encoders, workers=workers, batch_size=batch_size)
        start = time.perf_counter()
        parts = make_parts(clips, recipe, folder / "parts")
        elapsed_s = time.perf_counter() - start
        parse = recipe.features().deserialize_example_np
        features = np.stack([parse(record)["features"] for path in parts for record in read_records(path)])
        (folder / "parts").rmtree()
        return {"clips": len(clips), "seconds": elapsed_s, **_shares(make_parts.clock.seconds)}, features

    return measure


def _peers(config: Config, peers: dict, paths: Sequence[Path]) -> Measure:
    extract = extractor(config, peers)

    def measure() -> tuple[Figures, np.ndarray]:
        features, seconds = zip(*map(extract, paths), strict=True)
        total = {kind: sum(of_clip[kind] for of_clip in seconds) for kind in seconds[0]}
        return {"clips": len(paths), **_shares(total)}, np.stack(features)

    return measure


def _shares(seconds: dict[str, float]) -> Figures:
    """The percentage of each kind of work, from the seconds that each took."""
    of_encoders = sum(seconds.get(name, 0) for name in FEATURES)
    seconds = {"encoders": of_encoders} | {kind: value for kind, value in seconds.items() if kind in KINDS}
    total = sum(seconds[kind] for kind in ("decode", "face", "sound", "encoders"))
    return {f"{kind}_percent": 100 * value / total for kind, value in seconds.items()}

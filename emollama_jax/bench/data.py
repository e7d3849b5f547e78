"""Benchmark of the data pipeline: clips a second, beside the reference's pipeline on the same clips.

The reference's is a torch DataLoader: the first frame of each video with OpenCV, resized and normalised, and three
feature files. Ours reads the same clips from prepared records, tokenises and packs them. Batches are let go when they
are made, as training does: to keep all of them would measure the allocation of memory.
"""

import contextlib
import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from emollama_jax.bench.peer import obstacle
from emollama_jax.bench.predict import Pieces
from emollama_jax.bench.report import OURS, Figures, Measure, Report, alternate
from emollama_jax.config import Config, to_dict
from emollama_jax.data.annotations import Annotations, Clip
from emollama_jax.data.parts import EncodedClips, PartMaker
from emollama_jax.data.pipeline import train_dataset
from emollama_jax.data.prepare import prepare
from emollama_jax.data.recipe import Recipe
from emollama_jax.errors import UserError
from emollama_jax.io.worker_pool import default_workers
from emollama_jax.models.eva_vit import CLIP_MEAN, CLIP_STD
from emollama_jax.synthetic.dataset import make_dataset
from emollama_jax.text.labels import MERR

DATALOADER = "torch DataLoader"
COLUMNS = {"clips_per_s": "clips/s", "clips_per_cpu_s": "clips/s a core", "mb_per_s": "MB/s"}


def bench_data(
    config: Config,
    *,
    clips: int = 64,
    video: Path | None = None,
    workers: int = 0,
    repeats: int = 3,
    with_peer: bool = True,
) -> Report:
    """One epoch of synthetic clips, with stored frames and with stored image tokens.

    Args:
        video: a video of which every clip is a copy, in place of the synthetic ones, which are small.
        workers: processes that read, of ours and of the peer's.
    """
    why_no_peer = obstacle("torch", "cv2", wanted=with_peer)
    notes = ["MB/s counts images and features as stored in a batch; clips/s a core is by the CPU time of this process"]
    notes += [why_no_peer] if why_no_peer else []
    if workers:
        notes += ["the CPU time of worker processes is not counted: ignore clips/s a core"]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        annotations = _annotations(Path(folder), clips, video)
        peer = None if why_no_peer else _peers(annotations.clips, config, workers)
        for image in ("frame", "image_tokens"):
            path = _prepared(Path(folder), annotations, config, image)
            contenders = {OURS: _ours(path, config, workers), DATALOADER: peer}
            results += alternate(
                contenders, what=image, batch=config.data.batch_rows, repeats=repeats, derive=_more_rates
            )
            shutil.rmtree(path)
    settings = {"clips": clips, "video": video or "synthetic", "workers": workers, "repeats": repeats}
    return Report("Data", to_dict(config), settings, COLUMNS, results, notes)


def _annotations(folder: Path, count: int, video: Path | None) -> Annotations:
    """Clips with videos, features and captions."""
    if video is not None and not video.is_file():
        raise UserError(f"no such file: {video}; give a video")
    make_dataset(folder / "clips", clips={"train": count}, workers=default_workers())
    captions = json.loads((folder / "clips/MERR_coarse_grained.json").read_text())
    rng, clips = np.random.default_rng(0), []
    for i, (name, entry) in enumerate(captions.items()):
        features = [folder / f"{name}-{j}.npy" for j in range(3)]
        for path in features:
            np.save(path, rng.normal(size=1024).astype(np.float32))
        path = folder / f"clips/video/{name}.mp4"
        if video is not None:
            shutil.copy(video, path)
        caption = {"subtitle": entry["text"], "caption_coarse": entry["caption"]}
        clips.append(
            Clip(name=name, split="train", emotion=MERR[i % 9], video=path, features=tuple(features), **caption)
        )
    return Annotations(tuple(clips), ())


def _prepared(folder: Path, annotations: Annotations, config: Config, image: str) -> epath.Path:
    tokens = (1 + config.eva_vit.grid**2, config.eva_vit.hidden_size)
    recipe = Recipe(labels=MERR, image_storage=image, size=config.eva_vit.image_size, image_tokens_shape=tokens)
    rng = np.random.default_rng(0)
    noise = lambda count: rng.normal(size=(count, *tokens)).astype(np.float32)
    encode = lambda reads: EncodedClips(image_tokens=noise(len(reads)) if image == "image_tokens" else None)
    make_parts = PartMaker(encode=encode, workers=default_workers())
    return prepare("clips", annotations, folder / "data", recipe, make_parts).path


def _ours(path: epath.Path, config: Config, workers: int) -> Measure:
    data = dataclasses.replace(config.data, train=(f"{path}:train",), eval=(), weights=(), workers=workers)
    config = dataclasses.replace(config, data=data)
    dataset = train_dataset(config, Pieces(config.llama.vocab_size), epochs=1)

    def measure() -> tuple[Figures, int]:
        start, count = time.process_time(), 0
        with contextlib.closing(iter(dataset)) as iterator:
            for batch in iterator:
                count += int(batch.clip_mask.sum())
        cpu_s = time.process_time() - start
        one = [x[0, 0].nbytes for x in (batch.frames, batch.image_tokens, batch.features) if x is not None]
        return {"clips": count, "bytes": count * sum(one), "cpu_s": cpu_s}, count

    return measure


def _peers(clips: Sequence[Clip], config: Config, workers: int) -> Measure:
    import cv2
    import torch

    size = config.eva_vit.image_size
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))

    class FirstFrames(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(clips)

        def __getitem__(self, index: int) -> dict[str, Any]:
            from PIL import Image

            clip = clips[index]
            capture = cv2.VideoCapture(str(clip.video))
            _, pixels = capture.read()
            capture.release()
            image = Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
            image = torch.from_numpy(np.array(image.resize((size, size), Image.Resampling.BICUBIC)))
            image = (image.permute(2, 0, 1).float() / 255 - mean) / std
            features = torch.stack([torch.from_numpy(np.load(path)) for path in clip.features])
            return {"image": image, "features": features, "text": clip.caption_coarse}

    loader = torch.utils.data.DataLoader(FirstFrames(), batch_size=4, shuffle=True, num_workers=workers)

    def measure() -> tuple[Figures, int]:
        start, count, size = time.process_time(), 0, 0
        for batch in loader:
            count += len(batch["image"])
            size += batch["image"].nbytes + batch["features"].nbytes
        return {"clips": count, "bytes": size, "cpu_s": time.process_time() - start}, count

    return measure


def _more_rates(run: Figures) -> Figures:
    return {"clips_per_cpu_s": run["clips"] / run["cpu_s"], "mb_per_s": run["bytes"] / 1e6 / run["seconds"]}

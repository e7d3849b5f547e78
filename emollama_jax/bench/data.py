"""Data: how fast records become batches, beside what the reference does with the same clips.

The reference's way, as a torch DataLoader: the first frame of each video with OpenCV, resized and normalised, and three
feature files. Ours: the same clips prepared before, drawn, tokenised and packed.
"""

import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

from emollama_jax.bench.peer import obstacle
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
from emollama_jax.text.tokenizers import HFTokenizer, Tokenizer

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
    notes = ["MB/s is of images and features as they are in a batch; a core: of the processor time of this process"]
    notes += [why_no_peer] if why_no_peer else []
    if workers:
        notes += ["the processor time of worker processes is not counted: clips/s a core means nothing here"]
    tokenizer, results = _bytes_tokenizer(), []
    with tempfile.TemporaryDirectory() as folder:
        annotations = _annotations(Path(folder), clips, video)
        peer = None if why_no_peer else _peers(annotations.clips, config, workers)
        for image in ("frame", "image_tokens"):
            path = _prepared(Path(folder), annotations, config, image)
            contenders: dict[str, Measure] = {OURS: _ours(path, config, tokenizer, workers)}
            if peer is not None:
                contenders[DATALOADER] = peer
            results += alternate(
                contenders, what=image, batch=config.data.batch_rows, repeats=repeats, rate="clips_per_s"
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


def _prepared(folder: Path, annotations: Annotations, config: Config, image: str) -> Path:
    tokens = (1 + config.eva_vit.grid**2, config.eva_vit.hidden_size)
    recipe = Recipe(labels=MERR, image_storage=image, size=config.eva_vit.image_size, image_tokens_shape=tokens)
    rng = np.random.default_rng(0)
    noise = lambda count: rng.normal(size=(count, *tokens)).astype(np.float32)
    encode = lambda reads: EncodedClips(image_tokens=noise(len(reads)) if image == "image_tokens" else None)
    make_parts = PartMaker(encode=encode, workers=default_workers())
    return prepare("clips", annotations, folder / "data", recipe, make_parts).path


def _ours(path: Path, config: Config, tokenizer: Tokenizer, workers: int) -> Measure:
    data = dataclasses.replace(config.data, train=(f"{path}:train",), eval=(), weights=(), workers=workers)
    config = dataclasses.replace(config, data=data)

    def measure() -> tuple[Figures, int]:
        iterator = iter(train_dataset(config, tokenizer, epochs=1))
        with _Clock() as watch:
            batches = list(iterator)
        iterator.close()
        count = sum(int(batch.clip_mask.sum()) for batch in batches)
        first = batches[0]
        one = [x[0, 0].nbytes for x in (first.frames, first.image_tokens, first.features) if x is not None]
        return watch.figures(count, count * sum(one)), count

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
        with _Clock() as watch:
            batches = list(loader)
        count = sum(len(batch["image"]) for batch in batches)
        return watch.figures(count, sum(batch[n].nbytes for batch in batches for n in ("image", "features"))), count

    return measure


class _Clock:
    def __enter__(self):
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error):
        self._wall, self._cpu = time.perf_counter() - self._start[0], time.process_time() - self._start[1]

    def figures(self, clips: int, size: int) -> Figures:
        return {
            "clips_per_s": clips / self._wall,
            "clips_per_cpu_s": clips / self._cpu,
            "mb_per_s": size / 1e6 / self._wall,
        }


def _bytes_tokenizer() -> Tokenizer:
    """A token a byte: no vocabulary of a real model is at hand, and none makes more tokens."""
    pieces = sorted(ByteLevel.alphabet())
    spec = {
        "model": {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(["</s>", *pieces])}, "merges": []},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
    }
    return HFTokenizer(json.dumps(spec), bos=None, eos="</s>", pad=None)

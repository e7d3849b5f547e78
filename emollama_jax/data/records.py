"""Clip records: what is kept of a clip for training and evaluation, as TFDS features in ArrayRecord files.

    name              text
    emotion           int32: the index among the data set's labels, -1 where it is not known
    valence           float32, NaN where it is not known
    subtitle, caption_coarse, caption_fine   text, empty where there is none
    features          float32 [3, F]: MAE, VideoMAE, HuBERT; zeros where there is none
    has_feature       bool [3]
    frame             bytes: an image file of the frame, square (the builder's configuration "frame"), or
    image_tokens      float16 [T, D]: EVA-ViT's tokens of it (the configuration "image_tokens")

The data set's metadata says where these come from (`labels`, the recipe with its frame rule and encoders, versions),
and by `answers` what each record of a split can answer, so that nobody has to read them all to know.
"""

import io
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from emollama_jax.errors import UserError, first_line
from emollama_jax.io.json_lines import read_json_lines
from emollama_jax.io.paths import PathLike, as_path
from emollama_jax.text.answers import normalize_answer

IMAGE_STORAGE = ("frame", "image_tokens")
RECORD_FILE = ".array_record-"  # in the names of files that hold records
CLIP_INFO_FILE = "clips.jsonl"  # in a data set's folder: what was seen and heard in its clips


def features_dict(
    image_storage: str, *, feature_size: int, image_tokens_shape: tuple[int, int]
) -> tfds.features.FeaturesDict:
    """Return the features of a record that keeps its image as a `frame` or as `image_tokens`."""
    tensor = lambda shape, dtype: tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes")
    kept = tfds.features.Text() if image_storage == "frame" else tensor(image_tokens_shape, np.float16)
    return tfds.features.FeaturesDict(
        {
            "name": tfds.features.Text(),
            "emotion": np.int32,
            "valence": np.float32,
            "subtitle": tfds.features.Text(),
            "caption_coarse": tfds.features.Text(),
            "caption_fine": tfds.features.Text(),
            "features": tensor((3, feature_size), np.float32),
            "has_feature": tfds.features.Tensor(shape=(3,), dtype=np.bool_),
            image_storage: kept,
        }
    )


def encode_frame(frame: UInt8[np.ndarray, "I I 3"]) -> bytes:
    """Encode a frame as lossless WebP: what is read back is what went in. Smaller than PNG, and read in half the
    time."""
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "webp", lossless=True, method=0)
    return file.getvalue()


def decode_frame(data: bytes) -> UInt8[np.ndarray, "I I 3"]:
    """Decode the frame in a record."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def answers_of(records: Iterable[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Return what each of a split's records can answer: its `emotion`, and whether it has the captions (0 or 1)."""
    answers: dict[str, list[int]] = {"emotion": [], "caption_coarse": [], "caption_fine": []}
    for record in records:
        answers["emotion"].append(int(record["emotion"]))
        for caption in ("caption_coarse", "caption_fine"):
            answers[caption].append(int(bool(normalize_answer(record[caption]))))
    return answers


class Records:
    """The records of one split of a prepared data set, read one by one; a source for grain, shared with its workers.

    Attributes:
        path: the folder.
        metadata: what the preparation wrote about them.
    """

    def __init__(self, path: PathLike, split: str):
        """Open a data set. Records of one in an object store are read there when they are asked for, each by itself.

        Raises:
            UserError: there is no prepared data set, or it lacks the split.
        """
        self.path = epath.Path(path)
        builder = _open_builder(self.path)
        if split not in builder.info.splits:
            there = ", ".join(builder.info.splits) or "none"
            raise UserError(f"no split {split!r}: {path}; it has {there}")
        metadata = dict(builder.info.metadata or {})
        if missing := {"labels", "recipe", "answers"} - set(metadata):
            raise UserError(f"not prepared by emollama: {path} (no {', '.join(sorted(missing))}); prepare it again")
        self.metadata: Mapping[str, Any] = metadata | {"recipe": _current_recipe(metadata["recipe"])}
        self.split = split
        try:
            self._source = builder.as_data_source(split=split)
            self._length = len(self._source)
        except Exception as error:
            raise UserError(f"damaged records: {path} ({first_line(error)}); prepare it again") from error

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One record; texts are str.

        Raises:
            UserError: it cannot be read.
        """
        try:
            record = self._source[index]
        except Exception as error:
            raise UserError(
                f"record {index} of {self.split} cannot be read: {self.path} ({first_line(error)}); prepare it again"
            ) from error
        texts = ("name", "subtitle", "caption_coarse", "caption_fine")
        return {key: value.decode("utf-8") if key in texts else value for key, value in record.items()}


def _current_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a data set's recipe under today's names; the first version called some fields otherwise."""
    if "image_storage" in recipe:
        return {"subtitle_language": "", **recipe}
    names = {"frame": "frame_rule", "image": "image_storage", "subtitles": "subtitle_sources"}
    found = {names.get(name, name): value for name, value in recipe.items()}
    image_encoder = found.pop("encoder", "")
    encoders = {**(found.get("encoders") or {}), **({"eva_vit": image_encoder} if image_encoder else {})}
    return found | {"encoders": encoders, "subtitle_language": ""}


def read_clip_info(path: PathLike) -> list[dict[str, Any]]:
    """Read what was seen and heard in a data set's clips; nothing where that was not written down."""
    file = as_path(path) / CLIP_INFO_FILE
    try:
        return read_json_lines(file) if file.is_file() else []
    except ValueError as error:
        raise UserError(f"{error}: {file}; prepare the data set again") from error


def open_split(path: str, where: str = "") -> Records:
    """Open the records of FOLDER:SPLIT.

    Raises:
        UserError: the path has another form (`where` precedes the message), or as `Records`.
    """
    folder, found, split = path.rpartition(":")
    if not found:
        raise UserError(f"{where}{path!r} names no split; write FOLDER:SPLIT")
    return Records(folder, split)


def splits_of(path: PathLike) -> tuple[str, ...]:
    """Return the splits of a prepared data set. Raises UserError where there is none."""
    return tuple(_open_builder(path).info.splits)


def _open_builder(path: PathLike) -> tfds.core.DatasetBuilder:
    """Open a data set by its files; none of its records is read."""
    if not (as_path(path) / "features.json").is_file():
        raise UserError(f"no prepared data set: {path}; give the folder with features.json that prepare printed")
    try:
        return tfds.builder_from_directory(str(as_path(path)))
    except Exception as error:  # TFDS has no common class for what damaged files raise
        raise UserError(f"damaged data set: {path} ({first_line(error)}); prepare it again") from error

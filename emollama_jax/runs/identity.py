"""What identifies a run: the experiment, the data, the encoders and the base model. It resumes only as itself."""

from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from emollama_jax.config import Config, from_dict, to_dict, values_affecting
from emollama_jax.data.datasets import IndexedRecords, find_encoders, find_frame_rules, find_images
from emollama_jax.errors import UserError
from emollama_jax.io.checksums import file_digest
from emollama_jax.weights.locate import locate
from emollama_jax.weights.model_identity import identify_model

FILE = "file:"  # before the fingerprints of files


def describe_run(config: Config, datasets: Sequence[IndexedRecords], num_shards: int) -> dict[str, Any]:
    """Describes a run, in JSON's types: its experiment and the fingerprints of what it starts from.

    Args:
        datasets: the opened `config.data.train`.
        num_shards: parts that every batch is made of (`data/batch_shards.py`).

    Raises:
        UserError: the data is of frames and no encoder is given.
    """
    base = identify_model(config.weights.base)
    return {
        "config": to_dict(config),
        "data": [[s.records.split, len(s), s.records.metadata.get("fingerprint")] for s in datasets],
        "base": base.fingerprint,
        "base_origin": base.origin,
        "encoders": find_encoders(datasets) | _image_encoder_files(config, datasets),
        "frame_rules": find_frame_rules(datasets),
        "num_shards": num_shards,
    }


def _image_encoder_files(config: Config, datasets: Sequence[IndexedRecords]) -> dict[str, str]:
    """The fingerprints of the files that encode frames; none for data of image tokens."""
    if find_images(datasets) != "frames":
        return {}
    if not config.weights.eva_vit or not locate(config.weights.eva_vit).is_file():
        raise UserError(
            f"weights.eva_vit: no such file: {config.weights.eva_vit}; the data is of frames and needs it: "
            "give --config.weights.eva_vit=eva_vit_g.pth, or prepare the data with --image image_tokens"
        )
    files = {name: getattr(config.weights, name) for name in ("eva_vit", "ln_vision")}
    return {name: file_fingerprint(file) for name, file in files.items() if file}


def file_fingerprint(path: epath.PathLike) -> str:
    """Returns the fingerprint of an encoder's file, which tells it from those of parameters."""
    return FILE + file_digest(locate(path))


def is_file_fingerprint(fingerprint: str) -> bool:
    """Returns whether a fingerprint is of a file, rather than of parameters."""
    return fingerprint.startswith(FILE)


def upgrade_meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what an older run says of itself in the names of this version."""
    meta = dict(meta)
    for old, new in (("frames", "frame_rules"), ("shares", "num_shards")):
        if old in meta:
            meta[new] = meta.pop(old)
    files = meta.pop("encoder", None) or {}
    meta["encoders"] = meta.get("encoders", {}) | {name: FILE + digest for name, digest in files.items() if digest}
    return meta


def check_same(saved: Mapping[str, Any], now: Mapping[str, Any], workdir: object) -> None:
    """Raises UserError when the run in `workdir`, which is `saved`, would go on as another."""
    remedy = (
        f"set it back, or start another run from this one's weights: --config.train.workdir=NEW "
        f"--config.weights.trained={workdir}"
    )
    before = values_affecting(from_dict(saved["config"]), "resume")
    for name, value in values_affecting(from_dict(now["config"]), "resume").items():
        if before[name] != value:
            raise UserError(f"config.{name} was {before[name]!r} in this run and is {value!r} now: {workdir}; {remedy}")
    files = lambda meta: {name: value for name, value in meta["encoders"].items() if is_file_fingerprint(value)}
    for field, before, after in (
        ("data.train", saved["data"], now["data"]),
        ("weights.base", saved["base"], now["base"]),
        ("weights.eva_vit", files(saved), files(now)),
    ):
        if before != after:
            raise UserError(
                f"config.{field}: not what this run was begun with, by its fingerprint: {workdir}; {remedy}"
            )

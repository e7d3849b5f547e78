"""What makes a run the run it is: the experiment, the data and the base model. A run goes on only as itself."""

from collections.abc import Mapping, Sequence
from typing import Any

from emollama_jax.config import Config, from_dict, to_dict, values_affecting
from emollama_jax.data.datasets import IndexedRecords, find_encoders, find_frame_rules, find_images
from emollama_jax.errors import UserError
from emollama_jax.io.checksums import file_digest
from emollama_jax.io.paths import as_path
from emollama_jax.weights.base_checkpoint import is_base_checkpoint, read_manifest
from emollama_jax.weights.runs import checkpoint_of, is_run, read_meta


def check_paths(config: Config) -> None:
    """Raises UserError when the run's folder or the base model is not given or cannot be."""
    if not config.train.workdir:
        raise UserError("train.workdir: no folder for the run; give --config.train.workdir=FOLDER")
    if not config.weights.base:
        raise UserError("weights.base: no language model; give --config.weights.base=FOLDER, made by emollama convert")
    if not is_base_checkpoint(config.weights.base):
        raise UserError(
            f"weights.base: no base checkpoint: {config.weights.base}; make one with emollama convert MODEL FOLDER"
        )


def identity_of(config: Config, datasets: Sequence[IndexedRecords], num_shards: int) -> dict[str, Any]:
    """The experiment and the fingerprints of what it starts from, in JSON's types.

    Args:
        datasets: the opened `config.data.train`.
        num_shards: parts that the processes read of every batch.

    Raises:
        UserError: the data is of frames and no encoder is given.
    """
    eva_vit = None
    if find_images(datasets) == "frames":
        if not config.weights.eva_vit or not as_path(config.weights.eva_vit).is_file():
            raise UserError(
                f"weights.eva_vit: no such file: {config.weights.eva_vit}; the data is of frames and needs it: "
                "give --config.weights.eva_vit=eva_vit_g.pth, or prepare the data with --image image_tokens"
            )
        files = {name: getattr(config.weights, name) for name in ("eva_vit", "ln_vision")}
        eva_vit = {name: file_digest(file) if file else "" for name, file in files.items()}
    return {
        "config": to_dict(config),
        "data": [[s.records.split, len(s), s.records.metadata.get("fingerprint")] for s in datasets],
        "base": read_manifest(config.weights.base)["fingerprint"],
        "encoder": eva_vit,
        "encoders": find_encoders(datasets),
        "frames": find_frame_rules(datasets),
        "shares": num_shards,
    }


def check_encoders(trained: str, now: Mapping[str, Any]) -> None:
    """Raises UserError when the data's features are of other encoders than those that the run `trained` learnt."""
    if not is_run(trained):
        return
    before = read_meta(checkpoint_of(trained))["encoders"]
    for name in before.keys() & now["encoders"].keys():
        if before[name] != now["encoders"][name]:
            raise UserError(
                f"data.train: {name} features of {now['encoders'][name]}, and {trained} was trained on those of "
                f"{before[name]}; extract them again with that encoder, or begin without weights.trained"
            )


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
    for what, field in (("data", "data.train"), ("base", "weights.base"), ("encoder", "weights.eva_vit")):
        if saved[what] != now[what]:
            raise UserError(
                f"config.{field}: not what this run was begun with, by its fingerprint: {workdir}; {remedy}"
            )
    if saved["shares"] != now["shares"]:
        raise UserError(
            f"the batches were read in {saved['shares']} parts by the processes and would now be in {now['shares']}: "
            f"{workdir}; start as many processes as before, or another run: --config.train.workdir=NEW "
            f"--config.weights.trained={workdir}"
        )

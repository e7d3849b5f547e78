"""The features of many clips, from wherever they are kept, by modality.

    FOLDER, FOLDER:SPLIT   a prepared data set, or one split of it
    FOLDER                 the reference's folders in one: mae_340_UTT, maeV_399_UTT, HL-UTT
    FOLDER                 {name}.npy of one modality, which the folder's name tells where it is one of those above
    MODALITY=FOLDER        such a folder of any name

Axes: N clips, D feature size.
"""

import fnmatch
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from emollama_jax.data.annotation_files import FEATURE_FOLDERS, feature_folders
from emollama_jax.data.annotations import THREADS
from emollama_jax.data.clip_files import FeatureError, read_feature
from emollama_jax.data.records import Records, splits_of
from emollama_jax.data.tables import key_of
from emollama_jax.errors import UserError
from emollama_jax.io.paths import PathLike, as_path, local_path
from emollama_jax.text.prompts import FEATURES

UNNAMED = "features"  # the modality of a folder whose name tells none


class Features(NamedTuple):
    """Those of one modality."""

    index: dict[str, int]
    """Row by clip, under `key_of` its name."""
    rows: Float[np.ndarray, "N D"]


@dataclass(frozen=True)
class FeatureSet:
    """Features by modality; clips that lack one are not among those of it."""

    where: str
    modalities: Mapping[str, Features]
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Of the encoders, by modality, where it was written down."""
    problems: tuple[str, ...] = ()
    """Files that were left out, and why."""


def read_feature_set(where: PathLike) -> FeatureSet:
    """Reads all features of a set.

    Raises:
        UserError: there are none, or a prepared data set is damaged. Single files that cannot be read are noted.
    """
    where = str(where)
    path, split = as_path(where), None
    if not path.is_dir() and ":" in where:
        folder, _, split = where.rpartition(":")
        path = as_path(folder)
    if (path / "features.json").is_file() or split is not None:
        return _prepared(where, path, split)
    modality, named, folder = where.partition("=")
    if named and modality in FEATURES:
        return _files(where, {modality: local_path(folder)})
    if not path.is_dir():
        raise UserError(f"no such folder: {where}; give FOLDER, FOLDER:SPLIT or one of {', '.join(FEATURES)}=FOLDER")
    path = local_path(where)
    folders = {modality: folder for modality, folder in zip(FEATURES, feature_folders(path), strict=True) if folder}
    return _files(where, folders or {_modality_of(path): path})


def _prepared(where: str, path: PathLike, split: str | None) -> FeatureSet:
    found: dict[str, dict[str, np.ndarray]] = {modality: {} for modality in FEATURES}
    encoders = {}
    for name in splits_of(path) if split is None else [split]:
        records = Records(path, name)
        encoders = records.metadata["recipe"]["encoders"]
        for record in (records[i] for i in range(len(records))):
            for modality, row, there in zip(FEATURES, record["features"], record["has_feature"], strict=True):
                if there:  # of a clip that two splits share, the first is taken
                    found[modality].setdefault(key_of(record["name"]), row)
    modalities = {modality: _stacked(rows) for modality, rows in found.items() if rows}
    if not modalities:
        raise UserError(f"no features in the data set: {where}; extract them, or give another")
    return FeatureSet(where, modalities, dict(encoders))


def _files(where: str, folders: Mapping[str, Path]) -> FeatureSet:
    modalities, problems = {}, []
    for modality, folder in folders.items():
        try:
            paths = sorted(path for path in folder.iterdir() if path.suffix == ".npy" and path.is_file())
        except OSError as error:
            raise UserError(f"cannot list the folder {folder} ({error.strerror}); check the path") from error
        rows: dict[str, np.ndarray] = {}
        with ThreadPoolExecutor(THREADS) as pool:
            for path, row in zip(paths, pool.map(_read, paths), strict=True):
                if isinstance(row, FeatureError):
                    problems.append(str(row))
                else:
                    rows.setdefault(key_of(path.stem), row)
        if rows:
            modalities[modality] = _stacked(rows)
    if not modalities:
        reason = f"the first of {len(problems)} problems: {problems[0]}" if problems else "give a folder of .npy files"
        raise UserError(f"no features in {where}; {reason}")
    return FeatureSet(where, modalities, {}, tuple(problems))


def _read(path: Path) -> np.ndarray | FeatureError:
    try:
        return read_feature(path)
    except FeatureError as error:
        return error


def _stacked(rows: Mapping[str, np.ndarray]) -> Features:
    return Features({name: i for i, name in enumerate(rows)}, np.stack(list(rows.values())).astype(np.float32))


def _modality_of(folder: Path) -> str:
    """That of a folder of features, by its name."""
    name = folder.resolve().name
    patterns = zip(FEATURES, FEATURE_FOLDERS, strict=True)
    return next((modality for modality, usual in patterns if any(fnmatch.fnmatchcase(name, p) for p in usual)), UNNAMED)

"""Annotation files that the tests write, and short ways to read them."""

from pathlib import Path

import numpy as np

from emollama_jax.data.annotation_files import AnnotationFiles
from emollama_jax.data.annotations import Annotations, read_annotations
from emollama_jax.text import labels

ONES = np.ones(1024, np.float32)


def write(path: Path, content: str | bytes = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def save(path: Path, array=ONES, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array, **options)
    return path


def files_of(*lists: Path, labels: tuple[str, ...] = labels.MERR, **others) -> AnnotationFiles:
    return AnnotationFiles(lists=tuple((path.stem, path) for path in lists), labels=labels, **others)


def read(*lists: Path, **others) -> Annotations:
    return read_annotations(files_of(*lists, **others))


def told(annotations: Annotations) -> list[tuple[str, str | None, int | None]]:
    return [(problem.kind, problem.name, problem.line) for problem in annotations.problems]


def names(annotations: Annotations) -> list[str]:
    return [clip.name for clip in annotations.clips]


def entry(**fields) -> dict:
    whole = {"AU_list": ["AU05"], "visual_prior_list": [], "audio_prior_list": "calm", "peak_AU_list": {"AU05": 1.2}}
    return {**whole, "peak_index": 7, "text": "from MERR", "pseu_emotion": "fear", **fields}

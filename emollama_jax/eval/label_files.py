"""Sets of labels and descriptions by clip, in the files of the MER challenges and of this package.

    read_label_sets("results-openset.npz")   # {"sample_00000000": ("happy", "relieved"), ...}

    NAME-openset.npz     arrays `filenames` and `fileitems`: lists, or texts as in "[happy, relieved]"
    gt_NAME.npz          true labels: one array a clip, by its name
    NAME.npz             `name2reason`: descriptions by name
    .csv .xlsx .jsonl    `name` and `openset` (or emotion, discrete, label), a list as text; or `name` and `reason`

Names are matched as everywhere (`data.tables.key_of`).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emollama_jax.data.tables import key_of
from emollama_jax.errors import UserError
from emollama_jax.eval.answer_files import read_answers, read_labels
from emollama_jax.io.npz_files import read_npy, read_npz, write_npz
from emollama_jax.io.paths import PathLike
from emollama_jax.text.answers import plain_answer
from emollama_jax.text.labels import split_labels

LabelSet = tuple[str, ...]


def read_label_sets(path: Path) -> dict[str, LabelSet]:
    """The labels of each clip, by `key_of` its name; a clip may have none.

    Raises:
        UserError: the file cannot be read, holds descriptions instead, or names a clip twice.
    """
    if path.suffix == ".npz":
        found = read_npz(path)
        if "name2reason" in found:
            raise UserError(f"{path} holds descriptions, not labels; say with --extract how their labels are found")
        if {"filenames", "fileitems"} <= found.keys():
            names, items = _items(found["filenames"]), _items(found["fileitems"])
            if len(names) != len(items):
                raise UserError(f"{path} has {len(names)} filenames and {len(items)} fileitems; save it again")
            return _by_key(zip(names, items, strict=True), path)
        return _by_key(found.items(), path)
    answers = read_answers(path, ("emotion", "answer")).answers
    return {key: labels_in(text or "") for key, text in answers.items()}


def read_sentiments(path: Path) -> dict[str, float]:
    """The sentiment of each clip, a number, by `key_of` its name: the column `valence`, or else that of the label.

    Raises:
        UserError: there is none, or a label is not a number.
    """
    if path.suffix == ".npz":
        found = {name: str(value) for name, value in read_npz(path).items()}
        found = {key_of(name): value for name, value in found.items()}
    else:
        try:
            return {key: float(value) for key, value in read_labels(path, "valence").items()}
        except UserError:
            found = read_labels(path)
    try:
        return {key: float(value) for key, value in found.items()}
    except ValueError as error:
        raise UserError(f"{path}: a sentiment is not a number ({error}); give numbers below and above 0") from error


def read_descriptions(path: Path) -> dict[str, str]:
    """The descriptions of clips, by `key_of` their names. Raises UserError where there are none."""
    if path.suffix == ".npz":
        found = read_npz(path).get("name2reason")
        if not isinstance(found, dict):
            raise UserError(f"{path} has no name2reason; give the file of a model's descriptions")
        return {key_of(str(name)): str(text) for name, text in found.items()}
    return {key: text or "" for key, text in read_answers(path, ("answer", "caption_fine")).answers.items()}


def read_synonyms(folder: Path) -> dict[str, list[list[str]]]:
    """MER2024-OV's groups of synonyms by `key_of` the clip's name: a folder of .npy, each a list of lists as a text.

    Raises:
        UserError: there is none, or one cannot be read.
    """
    files = sorted(folder.glob("*.npy"))
    if not files:
        raise UserError(f"no .npy in {folder}; unpack the challenge's openset-synonym.zip")
    return {key_of(file.stem): _groups(read_npy(file)) for file in files}


def _groups(value: Any) -> list[list[str]]:
    """Parse "[['happy', 'glad'], ['sad']]", or take the lists that are there already."""
    if not isinstance(value, str):
        return [list(labels_in(group)) for group in _items(value)]
    inner = re.findall(r"\[([^\[\]]*)\]", value)
    return [group for group in (list(labels_in(text)) for text in inner) if group]


def write_label_sets(path: PathLike, labels: Mapping[str, Sequence[str]]) -> None:
    """Write `NAME-openset.npz`, as the scorers of the MER challenges read it; no pickle is in it."""
    texts = [f"[{', '.join(some)}]" for some in labels.values()]
    write_npz(path, {"filenames": np.array(list(labels), np.str_), "fileitems": np.array(texts, np.str_)})


def write_descriptions(path: PathLike, descriptions: Mapping[str, str]) -> None:
    """Write `name2reason`, as MER-UniBench's inference writes it."""
    write_npz(path, {"name2reason": np.array(dict(descriptions), object)})


def labels_in(value: Any) -> LabelSet:
    """Return the labels of a list, or of a text such as "['happy', 'sad']", "happy, sad" or "happy"; in lower case.

    >>> labels_in("['Happy', 'very sad']")
    ('happy', 'very sad')
    """
    if isinstance(value, str):
        value = split_labels(plain_answer(value))
    items = [value] if isinstance(value, float | int) else _items(value)
    labels = (str(label).lower().strip() for label in items)
    return tuple(dict.fromkeys(label for label in labels if label))


def _items(value: Any) -> list[Any]:
    return value.tolist() if isinstance(value, np.ndarray) else list(value)


def _by_key(pairs: Iterable[tuple[Any, Any]], path: Path) -> dict[str, LabelSet]:
    found: dict[str, LabelSet] = {}
    for name, value in pairs:
        if (key := key_of(str(name))) in found:
            raise UserError(f"{path}: the clip {name!r} is there twice; keep one of them")
        found[key] = labels_in(value)
    return found

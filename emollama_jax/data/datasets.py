"""The prepared data sets of an experiment, opened and checked: which clips they hold, and what those were made with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emollama_jax.config import Config
from emollama_jax.data.batch import Images
from emollama_jax.data.records import Records, open_split
from emollama_jax.data.transforms import answerable_tasks
from emollama_jax.errors import UserError


@dataclass(frozen=True)
class IndexedRecords:
    """The records of one data set, numbered through all data sets; a record also has its `number` and the `labels`."""

    records: Records
    first: int
    """Number of the first record."""

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.records[index] | {"number": self.first + index, "labels": self.records.metadata["labels"]}

    @property
    def recipe(self) -> Mapping[str, Any]:
        """How the records were made, from the data set's metadata."""
        return self.records.metadata["recipe"]

    @property
    def images(self) -> Images:
        """How the records keep their images."""
        return "frames" if self.recipe["image_storage"] == "frame" else "image_tokens"

    @property
    def frame_rule(self) -> str | None:
        """Rule by which frames were chosen; None where the data set does not say."""
        return self.recipe.get("frame_rule")

    @property
    def encoders(self) -> dict[str, str]:
        """Fingerprints by name of the encoders of features and, as `eva_vit`, of image tokens, as far as known."""
        return dict(self.recipe["encoders"])


@dataclass(frozen=True)
class AnswerableRecords:
    """The records of a data set that have an answer for a task of the prompt."""

    dataset: IndexedRecords
    indices: tuple[int, ...]

    @classmethod
    def select(cls, dataset: IndexedRecords, config: Config) -> "AnswerableRecords":
        """Select them by the metadata's `answers`, without reading a record."""
        metadata = dataset.records.metadata
        rows = zip(*metadata["answers"][dataset.records.split].values(), strict=True)
        known = lambda row: {
            "labels": metadata["labels"],
            "emotion": row[0],
            "caption_coarse": "x" * row[1],
            "caption_fine": "x" * row[2],
        }
        return cls(dataset, tuple(i for i, row in enumerate(rows) if answerable_tasks(known(row), config.prompt)))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[self.indices[index]]


def open_datasets(paths: Sequence[str], config: Config, where: str) -> list[IndexedRecords]:
    """Open the data sets FOLDER:SPLIT and number their records through.

    Args:
        where: field or option that names them, for messages.

    Raises:
        UserError: none is given, one does not exist or was prepared for another model than `config`'s, or their
            features are of different encoders.
    """
    if not paths:
        raise UserError(f"{where}: no data; give prepared data sets as FOLDER:SPLIT")
    datasets, first = [], 0
    for path in paths:
        datasets.append(IndexedRecords(open_split(path, f"{where}: "), first))
        _check_sizes(datasets[-1], config)
        first += len(datasets[-1])
    find_encoders(datasets)
    return datasets


def _check_sizes(dataset: IndexedRecords, config: Config) -> None:
    """Raise UserError when the records are not of the model's sizes."""
    eva_vit = config.eva_vit
    expected = {"feature_size": config.projectors.feature_size}
    if dataset.images == "frames":
        expected["size"] = eva_vit.image_size
    else:
        expected["image_tokens_shape"] = [1 + eva_vit.grid**2, eva_vit.hidden_size]
    for name, needed in expected.items():
        found = list(dataset.recipe[name]) if isinstance(needed, list) else dataset.recipe[name]
        if found != needed:
            path = dataset.records.path
            raise UserError(f"prepared with {name}={found}, the model has {needed}: {path}; prepare it for it")


def find_images(datasets: Sequence[IndexedRecords]) -> Images:
    """Find how all of the data sets keep their images.

    Raises:
        UserError: they differ in it, or in EVA-ViT.
    """
    if len({(dataset.images, dataset.encoders.get("eva_vit")) for dataset in datasets}) > 1:
        found = "; ".join(f"{dataset.records.path}: {dataset.images}" for dataset in datasets)
        raise UserError(f"data sets of different images or encoders cannot be mixed: {found}; prepare them alike")
    return datasets[0].images


def expected_images(paths: Sequence[str]) -> Images:
    """Tell how data sets FOLDER:SPLIT keep their images, which need not exist: by their folders NAME/IMAGE/VERSION,
    as `emollama prepare` makes them; frames where no folder says otherwise."""
    folders = [Path(path.rpartition(":")[0]) for path in paths]
    return "image_tokens" if any(folder.parent.name == "image_tokens" for folder in folders) else "frames"


def find_encoders(datasets: Sequence[IndexedRecords]) -> dict[str, str]:
    """Merge the data sets' encoders, name to fingerprint.

    Raises:
        UserError: two data sets name different ones.
    """
    known: dict[str, tuple[str, Path]] = {}
    for dataset in datasets:
        path = dataset.records.path
        for name, fingerprint in dataset.encoders.items():
            before, earlier = known.setdefault(name, (fingerprint, path))
            if before != fingerprint:
                raise UserError(
                    f"{name} features of different encoders or settings cannot be mixed: {earlier} ({before}) and "
                    f"{path} ({fingerprint}); extract one of them again as the other was"
                )
    return {name: fingerprint for name, (fingerprint, _) in known.items()}


def find_frame_rules(datasets: Sequence[IndexedRecords]) -> list[str] | None:
    """List the rules by which frames were chosen, each once and sorted; None where a data set does not say."""
    rules = {dataset.frame_rule for dataset in datasets}
    return None if None in rules else sorted(rules)


def find_clip_name(datasets: Sequence[IndexedRecords], number: int) -> str:
    """Find the name of the clip with this number."""
    dataset = next(dataset for dataset in reversed(datasets) if number >= dataset.first)
    return dataset.records[number - dataset.first]["name"]

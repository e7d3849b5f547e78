"""How a run's checkpoint was chosen, and whether clips that are evaluated had a part in it or in its training.

A score on clips that chose the checkpoint, or that it was trained on, is not a test score.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from emollama_jax.data.records import Records
from emollama_jax.errors import UserError
from emollama_jax.io.paths import as_path
from emollama_jax.runs.run import Run


@dataclass(frozen=True, slots=True)
class Selection:
    """How a checkpoint was chosen.

    Attributes:
        text: in words, for reports.
        chosen_on: the data sets FOLDER:SPLIT whose scores chose it; empty where it is the last of its run.
    """

    text: str
    chosen_on: tuple[str, ...]


def find_selection(run: Run) -> Selection:
    """Tell how a run's checkpoint was chosen: the last step of a run of fixed length, or by a validation."""
    settings, best = run.config.train, run.meta.get("best") or {}
    if not settings.validation:
        return Selection(f"step {run.step}, the last that is there; no validation", ())
    where, by = ", ".join(settings.validation), f"{settings.best_metric} on {', '.join(settings.validation)}"
    if as_path(run.path) == run.folder and best.get("step") == run.step:
        return Selection(f"step {run.step}, the best by {by}", settings.validation)
    if settings.patience:
        return Selection(f"step {run.step}, where {by} no longer rose", settings.validation)
    return Selection(f"step {run.step}, the last that is there; validated on {where}", ())


def check_unseen(run: Run, selection: Selection, splits: Sequence[Records]) -> None:
    """Check that the clips of splits neither chose the checkpoint nor trained it.

    Raises:
        UserError: they did.
    """
    trained_on = {(split, fingerprint) for split, _, fingerprint in run.meta.get("data", ()) if fingerprint}
    for records in splits:
        name = f"{records.path}:{records.split}"
        if any(_is_same(records, path) for path in selection.chosen_on):
            raise UserError(
                f"{run.path}: its checkpoint was chosen on {name} ({selection.text}), so that its score there is no "
                "test score; evaluate on other clips"
            )
        of_training = any(_is_same(records, path) for path in run.config.data.train)
        if of_training or (records.split, records.metadata.get("fingerprint")) in trained_on:
            raise UserError(f"{run.path} was trained on {name}; evaluate on other clips")


def _is_same(records: Records, path: str) -> bool:
    folder, _, split = path.rpartition(":")
    same = lambda where: str(as_path(where)).rstrip("/")
    try:
        resolve = lambda where: str(as_path(where).resolve())
        return split == records.split and resolve(folder) == resolve(records.path)
    except (NotImplementedError, OSError):  # an object store has no links
        return split == records.split and same(folder) == same(records.path)

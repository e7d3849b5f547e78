"""Examines runs and base checkpoints: whether every byte on the disk is what was written.

    for finding in examine("runs/stage2"):
        print(finding)

Loading reads a file once and then trusts its time of change; a disk that loses bits does not change it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from etils import epath
from flax import nnx

from emollama_jax.errors import UserError
from emollama_jax.io.file_list import FILES, find_damage
from emollama_jax.io.paths import PathLike, as_path
from emollama_jax.models.lora import is_adapter
from emollama_jax.runs.checkpoint_files import CHECKPOINTS, FIXED, check_fixed, find_steps, is_checkpoint
from emollama_jax.runs.run import Run
from emollama_jax.weights.base_checkpoint import fingerprint_of, is_base_checkpoint, is_sealed, read_manifest
from emollama_jax.weights.engine import param_values
from emollama_jax.weights.model_identity import identify_model
from emollama_jax.weights.pretrained import load_llama


@dataclass(frozen=True)
class Finding:
    """A folder that was examined, and what is wrong with it in words; "" for nothing."""

    path: epath.Path
    problem: str = ""

    def __str__(self) -> str:
        return f"{self.path}: {self.problem or 'sound'}"


def examine(path: PathLike) -> Iterator[Finding]:
    """Yields what is found of a run with all its checkpoints and its language model where that is there, of one
    checkpoint, of a base checkpoint, or of a folder that `emollama fetch` made. Every byte is read.

    Raises:
        UserError: the path is none of these.
    """
    where = as_path(path)
    if is_base_checkpoint(where):
        yield Finding(where, _problem_of_base(where))
    elif is_checkpoint(where):
        yield from _examine_checkpoints([where], where.parent.parent)
    elif Run.is_run(where):
        yield from _examine_checkpoints([where / CHECKPOINTS / str(step) for step in find_steps(where)], where)
    elif (where / FILES).is_file():
        yield Finding(where, find_damage(where, anew=True) or "")
    else:
        raise UserError(f"no run, checkpoint, base checkpoint or fetched folder: {path}; give the folder of one")


def _examine_checkpoints(folders: list[epath.Path], run: epath.Path) -> Iterator[Finding]:
    """Examines checkpoints, and once for all what they share."""
    digests: dict[str | None, None] = {}
    bases: dict[str, Run] = {}
    for folder in folders:
        problem = find_damage(folder, anew=True) or ""
        yield Finding(folder, problem)
        if not problem:
            opened = Run(folder, folder)
            digests[opened.meta.get("fixed")] = None
            bases[opened.config.weights.base] = opened
    for digest in digests:
        try:
            if check_fixed(run, digest, anew=True):
                yield Finding(run / FIXED)
        except UserError as error:
            yield Finding(run / FIXED, str(error))
    for base, opened in bases.items():
        if is_base_checkpoint(base):
            yield _finding_of_base(as_path(base), opened)


def _finding_of_base(base: epath.Path, run: Run) -> Finding:
    """Examines the language model that a run names, and whether it is the one that the run was trained on."""
    problem = _problem_of_base(base)
    if not problem and not run.provenance.base.may_be(identify_model(base)):
        problem = f"another language model than {run.path} was trained on"
    return Finding(base, problem)


def _problem_of_base(folder: epath.Path) -> str:
    try:
        if is_sealed(folder):
            return find_damage(folder, anew=True) or ""
        model, _ = load_llama(folder)
    except UserError as error:
        return str(error)
    found = fingerprint_of(param_values(nnx.state(model, nnx.Not(is_adapter))))
    return "" if found == read_manifest(folder)["fingerprint"] else "damaged (its parameters are not what was written)"

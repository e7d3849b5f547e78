"""Files of a Hugging Face hub and of other web addresses, downloaded whole or not at all.

Built on huggingface_hub, whose variables count: HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and others. The token
goes to the hub alone. Imports huggingface_hub when something is asked of a hub, as that takes half a second.
"""

import contextlib
import email.utils
import hashlib
import os
import re
import shutil
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from emollama_jax.errors import UserError, first_line
from emollama_jax.io.checksums import file_digest

DOWNLOADS = 4  # files at once
ATTEMPTS = 5  # of a request that a server has no time for
IN_VAIN = 3  # connections one after another that break before anything has come
LONGEST_PAUSE_S = 300  # that a server may ask for
TRY_AGAIN = (408, 429, 500, 502, 503, 504)
GO_ON = "run the command again: it goes on where it stopped"

OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class RemoteFile:
    """A file to download.

    Attributes:
        name: its path below the folder that it goes to.
        url: its address.
        size: in bytes; None where that is not known.
        sha256, git_sha1: what its content must have; "" where that is not known.
        repo: of the hub; "" for another server, which gets no token.
    """

    name: str
    url: str
    size: int | None = None
    sha256: str = ""
    git_sha1: str = ""
    repo: str = ""


def list_files(repo: str, revision: str = "main") -> tuple[str, list[RemoteFile]]:
    """Returns the commit that a revision of a model is now, and its files with their sizes and hashes.

    Raises:
        UserError: there is no such model or revision, the token does not open it, or the hub is not reached.
    """
    from huggingface_hub import HfApi, hf_hub_url

    api = HfApi()
    with explained(repo, revision):
        info = _patiently(lambda: api.model_info(repo, revision=revision, files_metadata=True))
        files = []
        for found in info.siblings or ():
            url = hf_hub_url(repo, found.rfilename, revision=info.sha, endpoint=api.endpoint)
            sha256 = found.lfs.sha256 if found.lfs else ""
            git_sha1 = "" if found.lfs else found.blob_id or ""
            files.append(RemoteFile(found.rfilename, url, found.size, sha256, git_sha1, repo))
    return info.sha, files


def cached_files(repo: str, revision: str, choose: Callable[[Sequence[str]], Sequence[str]]) -> Path:
    """Returns the folder of a model's snapshot in the hub's cache, with the files that `choose` takes of all names.

    What is not there yet is downloaded. The cache calls a file by its hash, with which the content is compared.

    Raises:
        UserError: as `list_files` and `download_all`; or the cache lacks the model, where HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import constants, hf_hub_download, snapshot_download

    with explained(repo, revision):
        if constants.HF_HUB_OFFLINE:
            folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
            paths = [folder / name for name in choose(sorted(path.name for path in folder.iterdir()))]
        else:
            _, files = list_files(repo, revision)
            get = lambda name: Path(_patiently(lambda: hf_hub_download(repo, name, revision=revision)))
            with ThreadPoolExecutor(DOWNLOADS) as pool:
                paths = list(pool.map(get, choose([file.name for file in files])))
    if not paths:
        raise UserError(f"no such file: {repo}; check the name")
    for path in paths:
        _check_cached(path)
    return Path(os.path.commonpath([path.parent for path in paths]))


def _check_cached(path: Path) -> None:
    """Raises UserError where a file of the cache is not what its name says, and removes it."""
    blob = path.resolve()
    digest = {64: file_digest, 40: git_digest}.get(len(blob.name))
    if digest and re.fullmatch("[0-9a-f]+", blob.name) and digest(blob) != blob.name:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise UserError(f"damaged in the hub's cache, by its hash: {path}; it was removed, run the command again")


def push_folder(folder: Path, repo: str, *, private: bool, message: str) -> str:
    """Uploads a folder as a commit to a model of the hub, which is made where it is missing, and returns its address.

    Raises:
        UserError: there is no token, it may not write there, or the hub is not reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with explained(repo):
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    return f"{api.endpoint}/{repo}"


def download_all(files: list[RemoteFile], folder: Path, on_bytes: OnBytes = lambda count: None) -> None:
    """Downloads files into a folder, several at once, and goes on with what an earlier try left there.

    A file has its name only when its size and hash are right; until then it is NAME.partial.

    Args:
        on_bytes: is told of every piece, by several threads; those of an earlier try count too.

    Raises:
        UserError: a file cannot be had, is not what it should be, or does not fit the disk.
    """
    if wrong := [file.name for file in files if ".." in Path(file.name).parts or Path(file.name).is_absolute()]:
        raise UserError(f"a file that would go elsewhere, {wrong[0]}: {files[0].repo}; do not use this model")
    folder.mkdir(parents=True, exist_ok=True)
    _check_space(files, folder)
    stop, lock = threading.Event(), threading.Lock()

    def count(size: int) -> None:
        if stop.is_set():
            raise UserError(f"stopped; {GO_ON}")
        with lock:
            on_bytes(size)

    with ThreadPoolExecutor(DOWNLOADS) as pool:
        futures = [pool.submit(download, file, folder / file.name, count) for file in files]
        try:
            for future in futures:
                future.result()
        finally:
            stop.set()  # after an error or an interrupt nobody waits for the others
            for future in futures:
                future.cancel()


def download(file: RemoteFile, target: Path, on_bytes: OnBytes = lambda count: None) -> None:
    """Downloads one file: see `download_all`."""
    if target.exists():
        on_bytes(target.stat().st_size)
        return
    partial = target.with_name(f"{target.name}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("ab") as out:
        if file.size is not None and out.tell() > file.size:
            out.truncate(0)
        on_bytes(out.tell())
        with explained(file.repo or file.url, name=file.name):
            _get_all(file, _LimitedFile(out, file, on_bytes))
    if problem := _wrong_content(file, partial):
        partial.unlink()
        raise UserError(f"{problem}: {file.url}; it was removed, download it again")
    os.replace(partial, target)


def _get_all(file: RemoteFile, out: "_LimitedFile") -> None:
    """Gets what is missing of a file over as many connections as it takes, as long as they bring something."""
    in_vain = 0
    while True:
        before = out.tell()
        try:
            return _patiently(lambda: _get(file, out))
        except _client_errors() as error:
            in_vain = in_vain + 1 if out.tell() == before else 0
            if _status(error) is not None or in_vain == IN_VAIN:
                raise
            time.sleep(in_vain)


def _get(file: RemoteFile, out: "_LimitedFile") -> None:
    """Gets what is missing of a file, over one connection."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers, disable_progress_bars

    disable_progress_bars("huggingface_hub.http_get")  # progress is the caller's
    headers = build_hf_headers(token=None if file.repo else False)
    there = out.tell()
    try:
        http_get(file.url, out, resume_size=there, headers=headers, expected_size=file.size)
    except HfHubHTTPError as error:
        if not (there and file.size is None and _status(error) == 416):  # all of it had come already
            raise


class _LimitedFile:
    """A file that counts what is written, and takes no more than the file's size."""

    def __init__(self, out: IO[bytes], file: RemoteFile, on_bytes: OnBytes):
        self._out, self._file, self._on_bytes = out, file, on_bytes

    def write(self, data: bytes) -> int:
        if self._file.size is not None and self._out.tell() + len(data) > self._file.size:
            self._out.truncate(0)
            raise UserError(
                f"the server sends more than the {self._file.size:,} bytes of {self._file.name}: {self._file.url}; "
                "it was removed, download it again"
            )
        self._on_bytes(len(data))
        return self._out.write(data)

    def truncate(self) -> int:
        """Forgets what follows: the server begins anew."""
        self._out.flush()
        self._on_bytes(self._out.tell() - os.fstat(self._out.fileno()).st_size)
        return self._out.truncate()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._out, name)


def _wrong_content(file: RemoteFile, path: Path) -> str:
    """Says in words why a downloaded file is not the one that was asked for; "" where it is."""
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        return f"{file.name} has {size:,} bytes, not {file.size:,}"
    if file.sha256 and file_digest(path) != file.sha256:
        return f"{file.name} is not what it should be, by its SHA-256"
    if file.git_sha1 and git_digest(path) != file.git_sha1:
        return f"{file.name} is not what it should be, by its SHA-1"
    return ""


def git_digest(path: Path) -> str:
    """Returns the SHA-1 by which git knows a file, which the hub gives of small ones."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _check_space(files: list[RemoteFile], folder: Path) -> None:
    """Raises UserError where the disk cannot hold what is still to come."""
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    missing = sum(file.size or 0 for file in files) - there
    if missing > (free := shutil.disk_usage(folder).free):
        raise UserError(
            f"too little room: {missing / 1e9:.1f} GB are to come and {free / 1e9:.1f} GB are free: {folder}; make "
            "room there, or choose another folder"
        )


def _patiently(get: Callable[[], Any]) -> Any:
    """Calls `get`, and again after a pause where the server is busy: the pause that it asks for, or a growing one.

    Since its version 1 huggingface_hub itself waits, too, as long as a server asks.
    """
    from huggingface_hub.errors import HfHubHTTPError

    for attempt in range(1, ATTEMPTS + 1):
        try:
            return get()
        except HfHubHTTPError as error:
            pause = _retry_after(error)
            pause = 2.0**attempt if pause is None else pause
            if _status(error) not in TRY_AGAIN or attempt == ATTEMPTS or pause > LONGEST_PAUSE_S:
                raise
            time.sleep(pause)


def _retry_after(error: Exception) -> float | None:
    """The seconds that a server asks to wait, which come as a number or as a date."""
    value = getattr(error.response, "headers", {}).get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return None


def _client_errors() -> tuple[type[Exception], ...]:
    """The classes of all that can go wrong on the way: of requests, or of httpx since version 1 of huggingface_hub."""
    from huggingface_hub import errors

    return tuple({errors.HTTPError, *errors.HTTPError.__bases__} - {Exception, OSError})


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


@contextlib.contextmanager
def explained(where: str, revision: str = "", name: str = "") -> Iterator[None]:
    """Turns what huggingface_hub and its client of HTTP raise into a UserError.

    Args:
        where: the model, or the address of another server.
        revision, name: of the model, and of the file in it, where they are asked for.
    """
    from huggingface_hub import errors

    try:
        yield
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise UserError(
            f"not in the cache of the hub, which is not asked or not reached ({first_line(error, 80)}): {where}; unset "
            "HF_HUB_OFFLINE, check the connection, or copy the files here and name their folder"
        ) from error
    except errors.HFValidationError as error:
        raise UserError(
            f"no name of a model: {where} ({first_line(error, 100)}); write ORG/NAME or ORG/NAME@REVISION"
        ) from error
    except _client_errors() as error:
        raise UserError(_explain(error, where, revision, name)) from error
    except OSError as error:
        if error.errno is not None or "onsistency check" not in str(error):
            raise
        raise UserError(f"{name or where}: the connection ended before all had come; {GO_ON}") from error


def _explain(error: Exception, where: str, revision: str, name: str) -> str:
    from huggingface_hub import HfApi, errors

    page = where if "://" in where else f"{HfApi().endpoint}/{where}"
    server, status = urllib.parse.urlsplit(page).netloc, _status(error)
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{where} is given to those who accept its terms: accept them at {page}, then give the token of that "
            "account (HF_TOKEN, or hf auth login)"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"no revision {revision or 'of this name'}: {where}; {page}/commits/main lists them"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no model of this name at {server} that your token, if any, may see: {where}; check both"
    if isinstance(error, errors.EntryNotFoundError) or status == 404:
        return f"no such file{f', {name}' if name else ''}: {where}; check the name"
    if status == 401:
        return f"{server} does not accept the token: {where}; check HF_TOKEN, or log in again (hf auth login)"
    if status == 403:
        return f"{server} refuses: {where}; the token must be allowed to read it (HF_TOKEN), see {page}"
    if status == 429:
        pause = _retry_after(error)
        return f"{server} is asked too often{f', wait {pause:.0f} s' if pause else ''}: {where}; {GO_ON}"
    if status is not None:
        return f"{server} answers with error {status}: {where}; {GO_ON}"
    while error.__cause__ or error.__context__:  # the client's own message is long and says the same
        error = error.__cause__ or error.__context__
    return f"{server} is not reached, or the connection broke ({first_line(error, 100)}): {where}; {GO_ON}"

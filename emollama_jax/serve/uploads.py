"""The files of one request: sent with it, in its text, at an address or on this machine; gone when it ends."""

import base64
import binascii
import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import IO, NamedTuple
from urllib.parse import unquote, unquote_to_bytes, urlsplit

import anyio

from emollama_jax.data.clip_files import readable_name
from emollama_jax.media.kinds import HEAD, kind_of
from emollama_jax.serve.errors import ApiError, bad_request
from emollama_jax.serve.fetch import Fetcher
from emollama_jax.serve.settings import ServeSettings

CHUNK = 1 << 20
NAME_LENGTH = 120


class MediaFile(NamedTuple):
    """A file that may be read, by its content: `kind` is video, audio or image, `digest` its SHA-256."""

    path: Path
    kind: str
    digest: str
    name: str


class Uploads:
    """The files of a request; a context manager that removes them."""

    def __init__(self, settings: ServeSettings, fetcher: Fetcher | None):
        self._settings, self._fetcher = settings, fetcher
        self._folder: tempfile.TemporaryDirectory | None = None
        self._count = 0

    def __enter__(self) -> "Uploads":
        self._folder = tempfile.TemporaryDirectory(prefix="emollama-request-")
        return self

    def __exit__(self, *error: object) -> None:
        self._folder.cleanup()

    async def from_upload(self, file: IO[bytes], name: str, content_type: str, param: str) -> MediaFile:
        """Take a file of a form."""
        path = self._new_path()
        await anyio.to_thread.run_sync(self._copy, file, path, param)
        return await self._known(path, name, param, says_audio=content_type.startswith("audio/"))

    async def from_base64(self, text: str, param: str, *, name: str = "", says_audio: bool = False) -> MediaFile:
        """Take a file that is part of a JSON text."""
        path = self._new_path()
        await anyio.to_thread.run_sync(self._decode, text, path, param)
        return await self._known(path, name, param, says_audio=says_audio)

    async def from_url(self, url: str, param: str, *, says_audio: bool = False) -> MediaFile:
        """Take what a URL means: data:, https: where fetching is allowed, file: below the allowed folder.

        Raises:
            ApiError: 400, 413 or 415.
        """
        scheme = url[:16].partition(":")[0].lower()
        if scheme == "data":
            return await self._from_data(url, param, says_audio)
        if scheme == "https":
            if self._fetcher is None:
                message = "this server fetches no clips; send the file, or a data: URL (--fetch allow)"
                raise bad_request(message, param, "fetch_refused")
            path = self._new_path()
            try:
                await self._fetcher.fetch(url, path)
            except ApiError as error:
                error.param = param
                raise
            return await self._known(path, Path(unquote(urlsplit(url).path)).name, param, says_audio=says_audio)
        if scheme == "file":
            path = await anyio.to_thread.run_sync(self._allowed_file, url, param)
            return await self._known(path, path.name, param, says_audio=says_audio)
        message = "a clip is a data:, https: or file: URL; give one of these, or send the file"
        raise bad_request(message, param, "bad_url")

    async def _from_data(self, url: str, param: str, says_audio: bool) -> MediaFile:
        head, comma, text = url.partition(",")
        if not comma or len(head) > 200:
            raise bad_request("a data: URL is data:TYPE;base64,DATA", param, "bad_url")
        says_audio = says_audio or head.lower().startswith("data:audio/")
        if head.lower().endswith(";base64"):
            return await self.from_base64(text, param, says_audio=says_audio)
        path = self._new_path()
        self._write(path, unquote_to_bytes(text), param)
        return await self._known(path, "", param, says_audio=says_audio)

    def _allowed_file(self, url: str, param: str) -> Path:
        refused = bad_request("files of this machine are not read from there (--allowed-media-path)", param, "bad_path")
        folder, parts = self._settings.allowed_media_path, urlsplit(url)
        if folder is None or parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
            raise refused
        try:
            path = Path(unquote(parts.path)).resolve(strict=True)
            allowed = path.is_relative_to(folder.resolve()) and path.is_file()
        except (OSError, ValueError, RuntimeError):
            raise refused from None
        if not allowed:
            raise refused
        return path

    def _new_path(self) -> Path:
        self._count += 1
        return Path(self._folder.name) / f"clip{self._count}"

    def _copy(self, file: IO[bytes], path: Path, param: str) -> None:
        with path.open("wb") as out:
            shutil.copyfileobj(file, out, CHUNK)
        self._check_size(path.stat().st_size, param)

    def _decode(self, text: str, path: Path, param: str) -> None:
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise bad_request(
                f"the clip's base64 is damaged ({error}); encode the whole file", param, "bad_base64"
            ) from error
        self._write(path, data, param)

    def _write(self, path: Path, data: bytes, param: str) -> None:
        self._check_size(len(data), param)
        path.write_bytes(data)

    def _check_size(self, size: int, param: str) -> None:
        if size > self._settings.max_upload:
            limit = self._settings.max_upload_mb
            raise ApiError(413, f"the clip has {size:,} bytes, and {limit} MB are taken; cut it", "too_large", param)

    async def _known(self, path: Path, name: str, param: str, *, says_audio: bool) -> MediaFile:
        return await anyio.to_thread.run_sync(_look_at, path, name, param, says_audio)


def _look_at(path: Path, name: str, param: str, says_audio: bool) -> MediaFile:
    """Tell the kind and the digest of a file. Raises ApiError for what is no clip."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        head = file.read(HEAD)
        digest.update(head)
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    if not head:
        raise bad_request("the clip is empty", param, "empty_clip")
    if not (kind := kind_of(head)):
        message = "the clip is of no known kind; send a video, a picture or a sound, such as .mp4, .webm, .png or .wav"
        raise ApiError(415, message, "no_clip", param)
    kind = "audio" if says_audio and kind == "video" else kind
    return MediaFile(path, kind, digest.hexdigest(), readable(name) or "clip")


def readable(name: str) -> str:
    """Return a client's name for a file without folders and what is not printed."""
    last = name.replace("\\", "/").rpartition("/")[2]
    return readable_name("".join(c for c in last if c.isprintable()))[:NAME_LENGTH]

"""How a server behaves: what it takes from whom, and how much of it."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from emollama_jax.errors import UserError
from emollama_jax.media.read_limits import ReadLimits


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """The arguments of `emollama serve` about requests."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str = ""
    """Clients give it as a bearer token; "" asks for none."""
    insecure: bool = False
    """Whether an address that others reach may be served without a key."""
    model_name: str = "emollama"
    slots: int = 8
    """Answers that are generated at the same time."""
    max_queue: int = 64
    """Requests that wait, or whose clips are read; more are refused."""
    max_upload_mb: int = 64
    """Of a clip, in 10^6 bytes."""
    request_timeout: float = 120.0
    """Seconds from a request's first byte to the last of its answer."""
    fetch: bool = False
    """Whether clips are fetched from https addresses."""
    allowed_media_domains: tuple[str, ...] = ()
    """The only hosts that clips are fetched from; () is any."""
    allowed_media_path: Path | None = None
    """The folder below which a request may name files."""
    warmup: bool = True
    drain_seconds: float = 25.0
    """That requests under way have once the server is to end."""
    cors_origins: tuple[str, ...] = ()
    readers: int = 2
    """Clips that are decoded at the same time, each in a process of its own."""
    cache_mib: int = 512
    """Memory of encoded clips that are kept for follow-up questions."""
    read_limits: ReadLimits = ReadLimits()

    def __post_init__(self):
        """Raises UserError where others could reach the server without a key."""
        if not (self.api_key or self.insecure or self.is_loopback):
            raise UserError(
                f"--host {self.host}: others reach this address; give --api-key or EMOLLAMA_API_KEY, or --insecure"
            )
        if self.allowed_media_path is not None and not self.allowed_media_path.is_dir():
            raise UserError(f"--allowed-media-path {self.allowed_media_path}: no such folder; give one that is there")

    @property
    def is_loopback(self) -> bool:
        """Whether the address is reached from this machine alone."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def max_upload(self) -> int:
        """Bytes of a clip."""
        return self.max_upload_mb * 10**6

    @property
    def max_body(self) -> int:
        """Bytes of a request: a clip in base64, and its text."""
        return self.max_upload * 4 // 3 + 2**21

    @property
    def most_requests(self) -> int:
        """Requests that are taken at the same time."""
        return self.slots + self.max_queue

"""Uploads: the file that $COLAB_UPLOAD names."""

import os
from pathlib import Path

from google.colab import note


def upload() -> dict[str, bytes]:
    note("files.upload")
    chosen = os.environ.get("COLAB_UPLOAD")
    return {f"My clip ({Path(chosen).stem}).mp4": Path(chosen).read_bytes()} if chosen else {}

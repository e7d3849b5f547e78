"""The user's Drive."""

from pathlib import Path

from google.colab import note


def mount(at: str) -> None:
    note("drive.mount", at)
    (Path(at) / "MyDrive").mkdir(parents=True, exist_ok=True)

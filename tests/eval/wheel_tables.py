"""Emotion wheels for tests: small ones of our own, and the challenge's where a copy lies near."""

import csv
import os
from pathlib import Path

import pytest

openpyxl = pytest.importorskip("openpyxl")

# Word forms -> base; base -> wheel words, in the first of eight runs; wheels of three levels.
FORMS = {"glad": "glad,gladly", "furious": "furious,fury", "down": "down", "amazed": "amazed", "mixed": "mixed"}
SYNONYMS = {"joyful": "glad, mixed", "angry": "furious, mixed", "gloomy": "down", "startled": "amazed"}
WHEELS = {
    1: [("Happy", "Joyful", "Thrilled"), ("Mad", "Angry", "Hostile"), ("", "Bitter", "Cold"), ("Sad", "Gloomy", "Low")],
    2: [(" Happy ", " Joyful ", " Thrilled "), ("Surprised", "Startled", "Shocked"), ("Bad", "Gloomy", "Angry")],
}


def write_tables(folder: Path) -> Path:
    """Write the small tables, as the scorer has them; wheels 3 to 5 are as wheel 2."""
    folder.mkdir(parents=True)
    words = sorted(
        {word for rows in WHEELS.values() for row in rows for word in (x.strip().lower() for x in row)} - {""}
    )
    with (folder / "format.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "format"])
        writer.writerows([*FORMS.items(), *((word, word) for word in words)])
    header = [name for run in range(1, 9) for name in (f"word_run{run}", f"synonym_run{run}")]
    rows = [[word.title(), SYNONYMS.get(word, "")] * 8 for word in words]
    _write(folder / "synonym.xlsx", [header, *rows])
    for wheel in range(1, 6):
        rows = WHEELS[min(wheel, 2)]
        _write(folder / f"wheel{wheel}.xlsx", [("level1", "level2", "level3"), *rows])
    return folder


def challenge_tables() -> Path:
    """The challenge's own tables; skips the test where there is no copy (EMOLLAMA_WHEELS names one)."""
    above = [parent / "shared/mer_wheels" for parent in Path(__file__).resolve().parents]
    for folder in [Path(os.environ.get("EMOLLAMA_WHEELS", "none")), *above]:
        if (folder / "wheel1.xlsx").is_file():
            return folder
    pytest.skip("no copy of the MER challenge's emotion wheels; EMOLLAMA_WHEELS names one")


def _write(path: Path, rows) -> None:
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append([cell or None for cell in row])
    book.save(path)

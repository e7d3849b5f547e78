"""Annotations in MERR's own files, which `emollama prepare merr` and the original's loader read, and with everything.

MERR_coarse_grained.txt, MERR_fine_grained.txt    name frames emotion valence; the valence is nan, as nobody gave one
MERR_coarse_grained.json, MERR_fine_grained.json  by name: units, phrases, tone, peak (from 0), words, label, caption
transcription_en_all.csv                          name,sentence
annotations.jsonl                                 everything about every clip: what made what, drops, failures
human_check.csv                                   for people: 20 clips of each label, to be scored 0 to 5
"""

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emollama_jax.captions.annotation import Annotation
from emollama_jax.io.atomic import write_json, write_text
from emollama_jax.io.json_lines import write_json_lines

GRAINS = ("coarse", "fine")


def write_merr_files(out: Path, annotations: Sequence[Annotation]) -> dict[str, int]:
    """Writes all files, in place of those that are there. A grain without any caption gets no files.

    Returns:
        How many clips have a caption of each grain.
    """
    annotated = [one for one in annotations if one.status == "annotated"]
    counts = {}
    for grain in GRAINS:
        described = [one for one in annotated if getattr(one, f"caption_{grain}")]
        counts[grain] = len(described)
        lists, captions = out / f"MERR_{grain}_grained.txt", out / f"MERR_{grain}_grained.json"
        if not described:
            lists.unlink(missing_ok=True)
            captions.unlink(missing_ok=True)
            continue
        write_text(lists, "".join(f"{one.name} {one.frames} {one.label} nan\n" for one in described))
        write_json(captions, {one.name: merr_entry(one, grain) for one in described})
    write_text(
        out / "transcription_en_all.csv", _table([("name", "sentence"), *((o.name, o.subtitle) for o in annotated)])
    )
    write_json_lines(out / "annotations.jsonl", map(dataclasses.asdict, annotations))
    return counts


def merr_entry(one: Annotation, grain: str) -> dict[str, Any]:
    """Makes a clip's entry in `MERR_{grain}_grained.json`."""
    caption = {"caption": one.caption_coarse} if grain == "coarse" else {"smp_reason_caption": one.caption_fine}
    return {
        "AU_list": [*one.units],
        "visual_prior_list": one.expression,
        "audio_prior_list": [one.voice] if one.voice else [],
        "peak_index": one.peak_index,
        "peak_AU_list": sorted(one.units, key=lambda unit: -one.units[unit]),
        "text": one.subtitle,
        "pseu_emotion": one.label,
        **caption,
    }


def _table(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()

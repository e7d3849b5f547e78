"""What MER-Factory has written about clips ({name}_merr_data.json), as far as it can be used here."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emollama_jax.errors import UserError
from emollama_jax.io.json_files import read_json_object

TOOL = "MER-Factory"
SUFFIX = "_merr_data.json"


@dataclass(frozen=True, slots=True)
class GivenParts:
    """What is given about a clip; None and "" where nothing is."""

    label: str = ""
    """As it is written there, until it is found among the labels of a set."""
    peak_index: int | None = None
    """From 0."""
    picture: str = ""
    voice: str = ""
    fine: str = ""


def read_mer_factory(folder: Path) -> tuple[dict[str, GivenParts], list[str]]:
    """Reads the files below a folder.

    Frames count from 1 there and from 0 here. Texts that say that there is nothing to say, as of a clip without sound,
    are left out, as are the lists of units, which hold the strongest ones alone.

    Returns:
        What is given, by the name of the clip, and, in a line each, which files are put aside and why.

    Raises:
        UserError: there is no such file below the folder.
    """
    paths = sorted(folder.rglob(f"*{SUFFIX}"))
    if not paths:
        raise UserError(f"no *{SUFFIX} below {folder}; give the folder that MER-Factory wrote to")
    given: dict[str, GivenParts] = {}
    first: dict[str, Path] = {}
    aside = []
    for path in paths:
        name = path.name.removesuffix(SUFFIX)
        if name in given:
            aside.append(f"{path}: a clip of this name is in {first[name]} already; it is put aside")
            continue
        try:
            given[name], first[name] = _parts(read_json_object(path)), path
        except (OSError, ValueError, TypeError, AttributeError) as error:
            aside.append(f"{path}: cannot be read ({error}); it is put aside, run MER-Factory again")
    return given, aside


def _parts(data: Mapping[str, Any]) -> GivenParts:
    peak = (data.get("overall_peak_frame_info") or {}).get("frame_number")
    texts = data.get("coarse_descriptions_at_peak") or {}
    if peak is not None and int(peak) < 1:
        raise ValueError(f"the peak is frame {peak}, and frames count from 1")
    return GivenParts(
        label=_text(data.get("ground_truth_label")),
        peak_index=None if peak is None else int(peak) - 1,
        picture=_text(texts.get("visual_objective")),
        voice=_text(texts.get("audio_analysis")),
        fine=_text(data.get("final_summary")),
    )


def _text(text: Any) -> str:
    text = " ".join(str(text or "").split())
    return "" if text.lower().rstrip(".") in ("", "n/a", "none", "unknown", "null") else text

"""The blendshapes of clips without action units: measured once, and kept as tables in a folder."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from emollama_jax.captions.annotation import SourceClip
from emollama_jax.captions.stage_store import ClipStages, stage_key
from emollama_jax.errors import UserError
from emollama_jax.io.atomic import write_text
from emollama_jax.io.checksums import file_digest
from emollama_jax.io.worker_pool import WorkerDied, map_ahead
from emollama_jax.media.clip import ClipConfig
from emollama_jax.media.container import decoder_fault
from emollama_jax.media.face_detection import detector_name
from emollama_jax.media.face_mesh import mesh_identity
from emollama_jax.media.mesh_units import VERSION, measure_blendshapes


@dataclass(frozen=True, slots=True)
class FaceUnits:
    """What was measured of a clip's main face."""

    table: Path
    """For `read_action_units`; without any frame with a face where `peak_index` is None."""
    peak_index: int | None
    """The frame in which the face is moved most, from 0."""


def measure_faces(
    clips: Sequence[SourceClip],
    folder: Path,
    stages: Mapping[str, ClipStages],
    config: ClipConfig,
    *,
    workers: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, FaceUnits | UserError]:
    """Measures clips, or takes what is kept of them; by name.

    Args:
        folder: gets {name}.csv of each clip.
        workers: child processes; 0 measures in this one.
        progress: is told how many are measured, of how many that are to be.

    Raises:
        UserError: there is no mesh where `config.mesh` says.
    """
    made_by = [VERSION, mesh_identity(config.mesh), detector_name(), dataclasses.asdict(config) | {"mesh": ""}]
    found: dict[str, FaceUnits | UserError] = {}
    keys, missing = {}, []
    for clip in clips:
        table = folder / f"{clip.name}.csv"
        try:
            keys[clip.name] = key = stage_key(*made_by, file_digest(clip.video))
        except OSError as error:
            found[clip.name] = UserError(f"cannot be read ({error.strerror})")
            continue
        value = stages[clip.name].get("units", key)
        if value is not None and table.exists() and file_digest(table) == value["table"]:
            found[clip.name] = FaceUnits(table, value["peak_index"])
        else:
            missing.append(clip)
    work = functools.partial(measure_blendshapes, config=config)
    measured = map_ahead(work, (clip.video for clip in missing), workers)
    for done, (clip, result) in enumerate(zip(missing, measured, strict=True), 1):
        if isinstance(result, WorkerDied):
            result = UserError(f"{clip.video}: it ended the process that decoded it: {decoder_fault(result)}")
        if isinstance(result, UserError):
            found[clip.name] = result
        else:
            table = folder / f"{clip.name}.csv"
            write_text(table, result["csv"])
            value = {"peak_index": result["peak_index"], "table": file_digest(table)}
            stages[clip.name].put("units", keys[clip.name], value)
            found[clip.name] = FaceUnits(table, result["peak_index"])
        progress(done, len(missing))
    return found

"""The peak frame and the label of a clip: what is given goes before its units, and units go before motion."""

from typing import Any

from emollama_jax.captions.annotation import AnnotateConfig, SourceClip
from emollama_jax.captions.face_units import FaceUnits
from emollama_jax.captions.mer_factory import TOOL
from emollama_jax.media.action_units import ActionUnits, read_action_units
from emollama_jax.media.mesh_units import above_baseline
from emollama_jax.media.peak import strongest_frame
from emollama_jax.media.unit_rules import UnitPeak, find_unit_peak, labels_out_of_reach

VERSION = 2  # counted up when the same units would give another peak or label


def find_peak_and_label(clip: SourceClip, measured: FaceUnits | None, config: AnnotateConfig) -> dict[str, Any]:
    """Returns the fields of an `Annotation` that the units and the label give. Without a label it is dropped.

    Args:
        measured: the blendshapes of a clip without action units, whose peak is found by motion.

    Raises:
        UserError: the file of the units cannot be read.
    """
    table, frame, frame_by = None, None, "motion"
    if clip.units is not None:
        table = read_action_units(clip.units, person=config.clip.person)
    elif measured is not None and measured.peak_index is not None:
        table, frame = above_baseline(read_action_units(measured.table)), measured.peak_index
    if clip.given.peak_index is not None:
        frame, frame_by = clip.given.peak_index, TOOL
    peak = None if table is None else _find_peak(table, clip.label or clip.given.label, frame, config)
    fields: dict[str, Any] = {"out_of_reach": labels_out_of_reach(table, config.rules)} if table is not None else {}
    if given := clip.label or clip.given.label:
        fields |= {"label": given, "label_by": "label file" if clip.label else TOOL}
    elif peak is None:
        return fields | {"status": "dropped", "reason": _why_no_label(table, measured)}
    elif peak.label not in config.labels:
        return fields | {"status": "dropped", "reason": f"its units say {peak.label}, which is none of the labels"}
    else:
        fields |= {"label": peak.label, "label_by": table.source}
    if peak is not None:
        fields |= {"units": peak.active, "units_by": table.source, "matches": peak.matches}
        if frame is None:
            frame, frame_by = peak.frame, table.source
    return fields | {"peak_index": frame, "peak_by": frame_by}


def _find_peak(table: ActionUnits, label: str, frame: int | None, config: AnnotateConfig) -> UnitPeak | None:
    """The peak by the rules of the label, where one is given and they match; else by all rules; else, of a clip with a
    label, the frame in which all units together are strongest."""
    for rules in ([rule for rule in config.rules if rule.label == label], config.rules):
        if rules and (peak := find_unit_peak(table, rules, active_from=config.active_from, frame=frame)):
            return peak
    if not label:
        return None
    frame = strongest_frame(table) if frame is None else frame
    active = table.active_at(frame, config.active_from)
    return UnitPeak(frame, label, sum(active.values()), active, {}) if active else None


def _why_no_label(table: ActionUnits | None, measured: FaceUnits | None) -> str:
    if table is None:
        return "no face is found, and no label" if measured else "no action units and no label"
    kind = "blendshapes at the peak" if table.source == "blendshapes" else "action units"
    return f"no rule matches its {kind}"

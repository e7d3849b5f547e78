"""A clip to be annotated, how, and everything that is found out about it."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from emollama_jax.captions.mer_factory import GivenParts
from emollama_jax.media.action_units import ACTIVE
from emollama_jax.media.clip import ClipConfig
from emollama_jax.media.unit_rules import RULES, UnitRule
from emollama_jax.text.labels import MERR


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceClip:
    """A raw clip, and what is given about it."""

    name: str
    video: Path
    units: Path | None = None
    """The file of its action units."""
    label: str = ""
    """Goes before what another tool and the units say."""
    subtitle: str = ""
    given: GivenParts = GivenParts()
    """What another tool has said of it: its peak goes before motion, its texts before describers and measures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotateConfig:
    """How clips are annotated."""

    rules: tuple[UnitRule, ...] = RULES
    active_from: float = ACTIVE
    """The intensity from which a unit is active."""
    labels: tuple[str, ...] = MERR
    """A clip whose rule gives another label is dropped."""
    seed: int = 0
    """Of the choice of phrases."""
    subtitle_sources: tuple[str, ...] = ()
    subtitle_language: str = ""
    clip: ClipConfig = field(default_factory=ClipConfig)
    """How clips are read. With a `mesh` the blendshapes of those without action units are measured; of several people
    `person` is the one."""


@dataclass
class Annotation:
    """Everything that was found out about a clip. `status` says what it is worth."""

    name: str
    video: str
    status: str = "annotated"
    """annotated; dropped (no label); failed (cannot be read)."""
    reason: str = ""
    """Why it was dropped or failed."""
    label: str = ""
    label_by: str = ""
    """label file, or the tool that gave it or whose units did."""
    peak_index: int | None = None
    peak_by: str = ""
    frames: int = 0
    units: dict[str, float] = field(default_factory=dict)
    """Those that are active at the peak, with their intensity."""
    units_by: str = ""
    """The tool that measured them."""
    matches: dict[str, float] = field(default_factory=dict)
    """The labels whose rules match at the peak, with their strength, best first."""
    out_of_reach: list[str] = field(default_factory=list)
    """Labels that the tool's units can never give."""
    expression: list[str] = field(default_factory=list)
    picture: str = ""
    voice: str = ""
    voice_measures: dict[str, float] | None = None
    subtitle: str = ""
    caption_coarse: str = ""
    caption_fine: str = ""
    describers: dict[str, str] = field(default_factory=dict)
    """By part."""
    unanswered: dict[str, str] = field(default_factory=dict)
    """Parts whose describer gave no text, and why: "refused: ..." is kept, "failed: ..." is asked again."""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class AnnotationResult:
    """What came of all clips."""

    annotations: list[Annotation]
    seconds: dict[str, float]
    """By stage."""

    def having(self, status: str) -> list[Annotation]:
        return [one for one in self.annotations if one.status == status]

    def counts(self) -> dict[str, Counter[str]]:
        """Counts labels of what is annotated, and reasons of what is dropped or failed."""
        return {
            "annotated": Counter(one.label for one in self.having("annotated")),
            "dropped": Counter(one.reason for one in self.having("dropped")),
            "failed": Counter(one.reason for one in self.having("failed")),
        }

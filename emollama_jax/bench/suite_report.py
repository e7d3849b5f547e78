"""The one table of `emollama bench all`: each measurement beside its limit, its goal and the peer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from emollama_jax.bench.profile import Breakdown
from emollama_jax.bench.report import OURS, machine_lines
from emollama_jax.io.atomic import write_json, write_text
from emollama_jax.io.text_table import align

COLUMNS = ("row", "kernels", "attention", "measured", "ms", "limit", "goal", "torch", "GiB", "best of", "took s", "")
NOT_RUN, FAILED, MEASURED = "not run", "failed", "measured"


class Limit(NamedTuple):
    """What bounds a rate.

    Attributes:
        figure: of a run, the rate in percent of the limit; absent where the device's peaks are unknown.
        goal: percent of the limit that are wanted.
    """

    figure: str
    meaning: str
    goal: float | None = None


@dataclass
class RowResult:
    """A row of the table, in JSON's types.

    Attributes:
        rate: the figure that is shown, and its unit.
        status: `measured`, `failed` or `not run`; `remark` says why.
        seconds: what it took, start and compilation included.
        report: of the benchmark (`Report.to_dict`).
    """

    name: str
    rate: tuple[str, str]
    ms: str
    limit: Limit
    status: str = NOT_RUN
    remark: str = ""
    seconds: float = 0.0
    report: dict[str, Any] | None = None

    def cells(self) -> list[str]:
        """One text a column."""
        if self.report is None:
            took = f"{self.seconds:.0f}" if self.status == FAILED else ""
            return [self.name, "", "", self.status, *[""] * 6, took, self.remark]
        ours, *peers = sorted(self.report["results"], key=lambda result: result["who"] != OURS)
        figure, unit = self.rate
        best, memory, settings = ours["best"], self.report["memory"], self.report["settings"]
        peer = ""
        if peers:
            theirs = peers[0]["best"][figure]
            peer = f"{_number(theirs)} ({best[figure] / theirs:.2f}x)"
        return [
            self.name,
            settings.get("dtype", self.report["config"]["llama"]["kernel_dtype"]),
            settings["attention"],
            f"{_number(best[figure])} {unit}",
            _number(best[self.ms]),
            *self._limit_and_goal(best),
            peer,
            f"{memory.get('device_gib', memory['host_gib']):.1f}",
            str(len(ours["runs"])),
            f"{self.seconds:.0f}",
            self.remark,
        ]

    def _limit_and_goal(self, best: dict[str, float]) -> tuple[str, str]:
        goal = self.limit.goal
        share, wanted = best.get(self.limit.figure), "" if goal is None else f">= {goal:.0f} %"
        if share is None:
            return "peak unknown", wanted
        limit = f"{share:.1f} % of {self.limit.meaning}"
        if goal is None:
            return limit, ""
        needed = best[self.rate[0]] * goal / share
        return limit, f"{wanted}, {_number(needed)}: {'met' if share >= goal else 'missed'}"

    @property
    def breakdown(self) -> Breakdown | None:
        """Of the profiled call."""
        found = [result.get("breakdown") for result in (self.report or {"results": []})["results"]]
        return next((Breakdown.from_dict(one) for one in found if one), None)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self), limit=self.limit._asdict())


@dataclass
class SuiteReport:
    """All rows, in the order they are measured in; written to `folder` as `all.json` and `all.md`."""

    folder: Path
    settings: dict[str, Any]
    rows: list[RowResult]

    @property
    def complete(self) -> bool:
        """Whether every row was measured."""
        return all(row.status == MEASURED for row in self.rows)

    @property
    def machine(self) -> dict[str, Any] | None:
        """Where the rows were measured; None before the first."""
        return next((row.report["machine"] for row in self.rows if row.report), None)

    def __str__(self) -> str:
        table = align([COLUMNS, *(row.cells() for row in self.rows)], left=True)
        return "\n".join([*self._head(), "", *table, "", *self._notes(), *self._breakdowns()])

    def markdown(self) -> str:
        """The same for a page."""
        line = lambda cells: f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
        table = [line(COLUMNS), line(["---"] * len(COLUMNS)), *(line(row.cells()) for row in self.rows)]
        blocks = ["", "```", *self._breakdowns()[1:], "```"] if self._breakdowns() else []
        return "\n".join([*(f"{text}  " for text in self._head()), "", *table, "", *self._notes(), *blocks, ""])

    def save(self) -> None:
        """Writes both files, in place of those of the row before."""
        fields = {"machine": self.machine, "settings": self.settings, "rows": [row.to_dict() for row in self.rows]}
        write_json(self.folder / "all.json", fields)
        write_text(self.folder / "all.md", self.markdown())

    def _head(self) -> list[str]:
        machine = machine_lines(self.machine) if self.machine else ["machine   nothing measured on it"]
        settings = [f"{name.replace('_', ' ')} {_setting(value)}" for name, value in self.settings.items()]
        return ["Speed of one device, random weights", *machine, f"settings  {', '.join(settings)}"]

    def _notes(self) -> list[str]:
        notes = [
            "figures are of the best repeat; the limits are the device's peaks as its maker states them",
            "at 4N: 4 operations a weight that a token is multiplied with",
        ]
        left = [row.name for row in self.rows if row.status == NOT_RUN]
        if left:
            notes.append(f"not run; to measure them: --rows {' '.join(left)}")
        return [f"- {note}" for note in notes]

    def _breakdowns(self) -> list[str]:
        found = [(row.name, row.breakdown) for row in self.rows]
        return [line for name, one in found if one for line in ("", f"{name}:", *one.lines())]


def _setting(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"

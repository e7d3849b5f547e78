"""What is wrong with the files of a data set, by clip, file and line."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

# The kinds of problem for which a clip is left out of the data set.
PUT_ASIDE = ("unsafe_name", "duplicate_name", "unknown_label", "unparsable_line", "not_prepared")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something wrong with the files of a data set."""

    kind: str
    """unsafe_name, duplicate_name, unknown_label or unparsable_line (the line of a list is put aside);
    unparsable_subtitle or unparsable_caption (the line or entry is left out); duplicate_key, several_labels,
    missing_video, missing_feature, missing_subtitle or missing_caption (the clip does without, or the first holds);
    counted_from_1 (peaks as MER-Factory writes them, from which 1 is taken off); wrong_shape, not_finite, object_dtype
    or unreadable_feature (the feature is left out); not_prepared (its files did not make a record)."""
    name: str | None
    """The clip, as it is written in the file."""
    file: str
    """Where to look."""
    line: int | None
    """Counted from 1; None in files that have no lines to speak of (.npy, .json)."""
    message: str
    """What is wrong, and the remedy."""

    def __str__(self) -> str:
        return f"{self.file}{f':{self.line}' if self.line else ''}: {self.message}"

    def to_json(self) -> str:
        """One line of JSON; bytes that are not UTF-8 appear as escapes."""
        text = json.dumps(dataclasses.asdict(self), ensure_ascii=False)
        return text.encode("utf-8", "backslashreplace").decode("utf-8")


class FileProblems:
    """Writes down the problems of one file.

    Attributes:
        path: the file.
        unparsable: the kind of a line or entry that cannot be read.
    """

    def __init__(self, path: Path, problems: list[Problem], unparsable: str = "unparsable_line"):
        self.path, self.unparsable = path, unparsable
        self._problems = problems

    def add(self, kind: str, name: str | None, line: int | None, message: str) -> None:
        """Note a problem."""
        problem = Problem(kind=kind, name=name, file=str(self.path), line=line, message=message)
        self._problems.append(problem)

    def add_unparsable(self, name: str | None, line: int | None, message: str) -> None:
        """Note a line or entry that cannot be read."""
        self.add(self.unparsable, name, line, message)

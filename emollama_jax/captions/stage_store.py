"""What the stages of an annotation gave for each clip, each kept with the key of everything that made it.

    store = StageStore("merr/stages")
    clip = store.open("clip_1")
    value = clip.get("voice", key)      # None unless the stage was done with this very key
    clip.put("voice", key, value)       # on the disk when it returns

A key is made of the values that a stage uses, not of the stages before it: what is made anew and comes out the same
leaves what depends on it as it is.
"""

import hashlib
import json
from typing import Any

from emollama_jax.io.atomic import write_json
from emollama_jax.io.json_files import read_json_object
from emollama_jax.io.paths import PathLike, as_path


def stage_key(*used: Any) -> str:
    """Makes the key of a stage from what it uses: anything that JSON can hold."""
    return hashlib.sha256(json.dumps(used, sort_keys=True, ensure_ascii=True).encode()).hexdigest()[:32]


class StageStore:
    """A folder with a JSON file for each clip."""

    def __init__(self, folder: PathLike):
        self._folder = as_path(folder)

    def open(self, name: str) -> "ClipStages":
        """Opens the stages of a clip, of which there may be none. A damaged file counts as none."""
        return ClipStages(self._folder / f"{name}.json")


class ClipStages:
    """The stages of one clip."""

    def __init__(self, path: PathLike):
        self._path = path
        try:
            stages = read_json_object(path)
        except (OSError, ValueError):
            stages = {}
        self._stages = {
            name: one for name, one in stages.items() if isinstance(one, dict) and {"key", "value"} <= {*one}
        }

    def get(self, stage: str, key: str) -> Any:
        """Returns what the stage gave with this key, None where it was not done so."""
        one = self._stages.get(stage, {})
        return one["value"] if one.get("key") == key else None

    def put(self, stage: str, key: str, value: Any) -> None:
        """Keeps what the stage gave, in place of what another key gave."""
        self._stages[stage] = {"key": key, "value": value}
        write_json(self._path, self._stages)

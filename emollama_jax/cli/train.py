"""Train adapters and projectors, or resume an interrupted run."""

import argparse
import os
import sys

from emollama_jax.cli._arguments import VerbParser, add_config_argument, add_process_arguments, parse, start_processes

EXIT_CODES = """exit codes:
  0    all steps are done, or the validation got no better for train.patience times
  1    a defect
  2    arguments, paths or data that do not fit
  3    the processes did not meet (--wait), or there are no devices
  4    the loss or its gradient was not finite (train.non_finite)
  75   asked to end by SIGTERM or SIGINT (Ctrl-C): saved, start it again
  130  interrupted by a second SIGINT: not saved
  134  another process of the run went away: JAX ends this one within a minute and says which ("task")

EMOLLAMA_HEARTBEAT names a file, also gs://BUCKET/FILE, in which the run tells whoever watches it its step and the
time."""


def run(argv: list[str]) -> int:
    config, arguments = parse(make_parser(), argv)
    import jax

    from emollama_jax.eval.validation import make_label_metrics
    from emollama_jax.train.loop import End, train

    codes = {End.DONE: 0, End.EARLY: 0, End.PREEMPTED: 75, End.NON_FINITE: 4}
    with start_processes(arguments):
        heartbeat = os.environ.get("EMOLLAMA_HEARTBEAT", "")
        outcome = train(config, more_metrics=make_label_metrics(config), heartbeat=heartbeat)
        best = "" if outcome.best is None else f"; the best checkpoint is that of step {outcome.best:,}"
        what = f" ({outcome.message})" if outcome.message else ""
        if jax.process_index() == 0:
            print(f"step {outcome.step:,}: {outcome.end.value}{what}{best}: {config.train.workdir}", file=sys.stderr)
        return codes[outcome.end]


def make_parser() -> argparse.ArgumentParser:
    parser = VerbParser(
        prog="emollama train",
        usage="emollama train --config NAME_OR_PATH [--config.GROUP.FIELD=VALUE ...]\n"
        "                      [--pod | --coordinator HOST:PORT --processes N --process I [--wait SECONDS]]",
        description="Trains on prepared data sets (data.train) from a base checkpoint (weights.base), and writes\n"
        "checkpoints and metrics into the run's folder (train.workdir). Started again, it goes on from the newest\n"
        "sound checkpoint there. On several hosts it is started on each of them; Slurm and GKE are recognised.",
        epilog=f"example: emollama train --config stage1_merr --config.weights.base=weights/llama2 "
        f"--config.train.workdir=runs/stage1\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_argument(parser)
    add_process_arguments(parser)
    return parser

"""Runs one benchmark in a process of its own, whose crash or lack of memory harms no other.

    python -m emollama_jax.bench.worker REQUEST.json RESULT.json

The request holds the benchmark's name, the experiment and the options; the result its report, or one line of `error`
and whether there was a peer, which may have been the cause.
"""

import json
import sys
from pathlib import Path
from typing import Any

from emollama_jax.bench.decode import bench_decode
from emollama_jax.bench.encode import bench_encode
from emollama_jax.bench.peer import obstacle
from emollama_jax.bench.train import bench_train
from emollama_jax.config import from_dict
from emollama_jax.errors import as_user_error, first_line
from emollama_jax.io.atomic import write_json

BENCHES = {"train": bench_train, "decode": bench_decode, "encode": bench_encode}


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """The result of a request: `report`, or `error` and `had_peer`."""
    options = dict(request["options"])
    if options.get("trace"):
        options["trace"] = Path(options["trace"])
    try:
        return {"report": BENCHES[request["bench"]](from_dict(request["config"]), **options).to_dict()}
    except Exception as error:  # whatever it is, the rows after this one are measured
        known = as_user_error(error)
        had_peer = obstacle("torch", "transformers", "peft", wanted=options["with_peer"]) is None
        return {"error": str(known or f"{type(error).__name__}: {first_line(error)}"), "had_peer": had_peer}


if __name__ == "__main__":
    write_json(sys.argv[2], measure(json.loads(Path(sys.argv[1]).read_text())))

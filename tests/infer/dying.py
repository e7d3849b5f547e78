"""`emollama predict` that is killed in the midst of a write: python -m tests.infer.dying SEED ARGUMENT...

The seed draws which of the writes it is, among the next few, and how much of it reaches the file.
"""

import json
import os
import random
import signal
import sys

from emollama_jax.cli import main
from emollama_jax.io.json_lines import JsonLinesFile

FEW = 4


def die_in_a_write(rng: random.Random) -> None:
    """Arranges it; a run that has fewer writes to do ends well."""
    append, left = JsonLinesFile.append, [rng.randrange(FEW)]

    def append_or_die(self, records):
        if left[0]:
            left[0] -= 1
            return append(self, records)
        data = "".join(f"{json.dumps(record)}\n" for record in records).encode()
        with self.path.open("ab") as file:
            file.write(data[: rng.randrange(len(data) + 1)])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    JsonLinesFile.append = append_or_die


if __name__ == "__main__":
    die_in_a_write(random.Random(int(sys.argv[1])))
    sys.exit(main(["predict", *sys.argv[2:]]))

"""What of Colab notebooks call, here writing down what it is asked for, a line of JSON each."""

import json
import os
from typing import Any


def note(what: str, argument: Any = None) -> None:
    with open(os.environ["COLAB_ASKED"], "a") as file:
        file.write(json.dumps([what, argument]) + "\n")

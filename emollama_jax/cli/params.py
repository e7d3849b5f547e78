"""Count the parameters of an experiment, and those that are trained."""

import argparse
import math
from collections import defaultdict
from dataclasses import dataclass, field

import jax.dtypes
from flax import nnx

from emollama_jax.config import Config, parse_flags
from emollama_jax.errors import UserError
from emollama_jax.models.llama import Llama
from emollama_jax.models.lora import is_trainable
from emollama_jax.sharding import abstract

# Rows of the table, by what a parameter's path contains; the first that fits takes it.
GROUPS = {
    "LoRA": (".lora_",),
    "embedding": ("embed.",),
    "attention": (".attn.",),
    "MLP": (".mlp.",),
    "norms": ("norm.scale",),
    "head": ("lm_head.",),
}


def run(argv: list[str]) -> None:
    config, rest = parse_flags(_help_first(argv))
    if rest:
        raise UserError(f"unknown argument {rest[0]!r}; emollama params takes --config and --config.GROUP.FIELD=VALUE")
    print(table(config))


def _help_first(argv: list[str]) -> list[str]:
    parser = argparse.ArgumentParser(
        prog="emollama params",
        usage="emollama params --config NAME_OR_PATH [--config.GROUP.FIELD=VALUE ...]",
        description="Prints the parameters by part, from shapes alone: nothing is loaded or allocated.",
    )
    return parser.parse_known_args(argv)[1]


def table(config: Config) -> str:
    """Parameters, storage and share of each part of the model, and what is trained."""
    _, state = abstract(lambda: Llama(config.llama, config.lora, rngs=nnx.Rngs(0)))
    parts: dict[str, Part] = defaultdict(Part)
    for path, variable in nnx.to_flat_state(state):
        name, value = ".".join(map(str, path)), variable.get_value()
        group = next(group for group, marks in GROUPS.items() if any(mark in name for mark in marks))
        counted = parts[group], parts["all"], parts["trainable" if is_trainable(path, variable) else "frozen"]
        for part in counted:
            part.add(value)
    rows = [*(group for group in GROUPS if group in parts), "all", "frozen", "trainable"]
    lines = [f"{'part':<12}{'parameters':>15}{'share':>12}{'memory':>15}  stored as"]
    for name in rows:
        part = parts[name]
        share = 100 * part.parameters / parts["all"].parameters
        stored = ", ".join(sorted(part.dtypes)) or "-"
        lines.append(f"{name:<12}{part.parameters:>15,}{share:>10.4f} %{part.bits / 8 / 2**20:>11,.1f} MiB  {stored}")
    return "\n".join(lines)


@dataclass
class Part:
    """A sum over parameters. The scales of a quantised kernel count as memory, not as parameters."""

    parameters: int = 0
    bits: int = 0
    dtypes: set[str] = field(default_factory=set)

    def add(self, value) -> None:
        self.parameters += math.prod(value.shape)
        self.bits += sum(leaf.size * jax.dtypes.itemsize_bits(leaf.dtype) for leaf in jax.tree.leaves(value))
        self.dtypes.add(str(getattr(value, "qtype", value.dtype)))

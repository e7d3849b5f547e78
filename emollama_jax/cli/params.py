"""Count the parameters of an experiment, in all and trained."""

import argparse
import functools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import jax
import jax.dtypes
from flax import nnx

from emollama_jax.cli._arguments import VerbParser, add_config_argument, at_least, parse
from emollama_jax.config import Config
from emollama_jax.errors import UserError
from emollama_jax.models.emotion_llama import EmotionLlama, is_trainable
from emollama_jax.sharding import abstract, mesh_sizes, partition_spec

# Rows of the table, by what a parameter's path contains; the first that fits takes it.
GROUPS = {
    "LoRA": (".lora_",),
    "projectors": ("projectors.",),
    "EVA-ViT": ("eva_vit.",),
    "embedding": ("embed.",),
    "attention": (".attn.",),
    "MLP": (".mlp.",),
    "norms": ("norm.scale",),
    "head": ("lm_head.",),
}
TOTALS = ("all", "frozen", "trainable")


def run(argv: list[str]) -> None:
    config, arguments = parse(make_parser(), argv)
    if arguments.each:
        from clu.parameter_overview import get_parameter_overview

        print(get_parameter_overview(nnx.to_pure_dict(_abstract_state(config)), include_stats=False))
    print(table(config, arguments.devices))


def make_parser() -> argparse.ArgumentParser:
    parser = VerbParser(
        prog="emollama params",
        usage="emollama params --config NAME_OR_PATH [--config.GROUP.FIELD=VALUE ...] [--devices N] [--each]",
        description="Prints the parameters by part, and the memory they take on each device of the experiment's mesh, "
        "from shapes alone: nothing is loaded or allocated.",
    )
    parser.add_argument(
        "--devices", type=at_least(1), metavar="N", help="for a mesh that takes all there are (default: this machine's)"
    )
    parser.add_argument("--each", action="store_true", help="also list every parameter with its shape and dtype")
    add_config_argument(parser)
    return parser


def table(config: Config, devices: int | None = None) -> str:
    """Parameters, storage and share of each part of the model, and what is trained.

    Args:
        devices: how many a mesh takes whose size is -1 along an axis; default: those of this machine.

    Raises:
        UserError: the mesh does not fit them.
    """
    sizes = asdict(config.mesh)
    try:
        sizes = mesh_sizes(
            sizes, (devices or jax.device_count()) if -1 in sizes.values() else math.prod(sizes.values())
        )
    except UserError as error:
        raise UserError(f"{error}; give another number with --devices") from error
    parts = _count(config, sizes)
    rows = [*(group for group in GROUPS if group in parts), *TOTALS]
    lines = [f"{'part':<12}{'parameters':>15}{'share':>12}{'memory':>15}{'a device':>15}  stored as"]
    for name in rows:
        part = parts[name]
        share = 100 * part.parameters / parts["all"].parameters
        memory = "".join(f"{bits / 8 / 2**20:>11,.1f} MiB" for bits in (part.bits, part.device_bits))
        stored = ", ".join(sorted(part.dtypes)) or "-"
        lines.append(f"{name:<12}{part.parameters:>15,}{share:>10.4f} %{memory}  {stored}")
    others = ("projectors", "EVA-ViT")
    llama = parts["all"].parameters - sum(parts[name].parameters for name in others)
    mesh = " x ".join(f"{name}={size}" for name, size in sizes.items())
    lines += ["", f"LoRA is {100 * parts['LoRA'].parameters / llama:.4f} % of LLaMA + LoRA, {llama:,} parameters"]
    lines += [f"a device: of {math.prod(sizes.values())}, {mesh}"]
    return "\n".join(lines)


@dataclass
class Part:
    """A sum over parameters. The scales of a quantised kernel count as memory, not as parameters."""

    parameters: int = 0
    bits: int = 0
    device_bits: int = 0
    dtypes: set[str] = field(default_factory=set)

    def add(self, value, axes: Sequence[str | None], sizes: Mapping[str, int], rules) -> None:
        self.parameters += math.prod(value.shape)
        for leaf in jax.tree.leaves(value):
            bits = leaf.size * jax.dtypes.itemsize_bits(leaf.dtype)
            spec = partition_spec(axes, leaf.shape, dict(sizes), rules)
            self.bits += bits
            split = [(entry,) if isinstance(entry, str) else entry or () for entry in spec]
            self.device_bits += bits // math.prod(sizes[axis] for entry in split for axis in entry)
        self.dtypes.add(str(getattr(value, "qtype", value.dtype)))


def _abstract_state(config: Config) -> nnx.State:
    _, state = abstract(
        lambda: EmotionLlama.init(config.llama, config.lora, config.projectors, config.eva_vit, rngs=nnx.Rngs(0))
    )
    return state


def _count(config: Config, sizes: Mapping[str, int]) -> dict[str, Part]:
    state = _abstract_state(config)
    is_trained = functools.partial(is_trainable, parts=config.trainable)
    parts: dict[str, Part] = defaultdict(Part)
    for path, variable in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        group = next(group for group, marks in GROUPS.items() if any(mark in name for mark in marks))
        axes = variable.get_metadata("out_sharding")
        for part in (parts[group], parts["all"], parts["trainable" if is_trained(path, variable) else "frozen"]):
            part.add(variable.get_value(), axes, sizes, config.sharding)
    return parts

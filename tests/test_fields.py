"""Facts declared with a field: bounds and choices are enforced, and what a field affects is found."""

import ast
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest

from emollama_jax import fields
from emollama_jax.config import Config, from_dict, to_dict, values_affecting
from emollama_jax.errors import UserError
from emollama_jax.fields import check_fields, describe_range, field, fields_affecting
from emollama_jax.models.eva_vit import EvaVitConfig
from emollama_jax.models.hubert import HubertConfig
from emollama_jax.models.llama import LlamaConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    size: int = field(1, gt=0, le=8, affects=("resume", "execution"))
    rates: tuple[float, ...] = field((), ge=0, lt=1, affects=())
    kind: str = field("a", choices=("a", "b"))
    kinds: tuple[str, ...] = field(("a",), choices=("a", "b"))
    plain: int = 0

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    inner: Inner = Inner()
    other: Inner = field(Inner(), affects=("resume",))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"size": 0}, "^size=0: must be above 0 and at most 8$"),
        ({"size": 9}, "^size=9: must be above 0 and at most 8$"),
        ({"rates": (0.0, 1.0)}, r"^rates=\(0.0, 1.0\): must be at least 0 and below 1$"),
        ({"rates": (float("nan"),)}, "^rates=.*at least 0"),
        ({"kind": "c"}, "^kind='c': choose one of a, b$"),
        ({"kinds": ("a", "c")}, r"^kinds=\('a', 'c'\): no 'c'; choose among a, b$"),
    ],
)
def test_values_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        Inner(**changes)


def test_bounds_are_inclusive_where_they_say_so():
    assert Inner(size=8, rates=(0.0, 0.5), kind="b", kinds=()).size == 8
    assert [describe_range(one) for one in dataclasses.fields(Inner)][1:3] == ["at least 0 and below 1", ""]


def test_a_field_in_a_group_affects_what_both_affect():
    assert fields_affecting(Outer, "execution") == ("inner.size",)
    plain = ("kind", "kinds", "plain")
    assert fields_affecting(Outer, "prediction") == tuple(f"inner.{name}" for name in plain)
    resume = ("size", *plain)
    assert fields_affecting(Outer, "resume") == (*(f"inner.{n}" for n in resume), *(f"other.{n}" for n in resume))


# What the experiment's fields affect, written out.
MAY_CHANGE_ON_RESUME = (
    *("data.train", "data.eval", "data.workers", "data.read_ahead", "data.prefetch"),
    *("clip", "generate", "mesh", "sharding", "mae", "videomae", "hubert", "weights"),
    *(f"llama.{name}" for name in ("scan_layers", "remat", "attention", "loss_chunk")),
    *(f"train.{name}" for name in ("workdir", "steps", "non_finite", "validation", "validation_interval")),
    *(f"train.{name}" for name in ("best_metric", "patience", "log_interval", "checkpoint_interval", "keep")),
    *(f"train.{name}" for name in ("compile_cache", "profile")),
)
IDENTITY_OF_PREDICTIONS = ("llama", "lora", "eva_vit", "projectors", "clip", "prompt", "generate", "seed")
ENCODER_EXECUTION = ("kernel_dtype", "param_dtype", "compute_dtype", "attention")
LLAMA_EXECUTION = (
    *("kernel_dtype", "int8_products", "param_dtype", "compute_dtype"),
    *("scan_layers", "remat", "attention", "loss_chunk"),
)


def leaves(group: type = Config, where: str = "") -> list[str]:
    found = []
    for one in dataclasses.fields(group):
        nested = dataclasses.is_dataclass(one.type)
        found += leaves(one.type, f"{where}{one.name}.") if nested else [f"{where}{one.name}"]
    return found


def below(paths: tuple[str, ...]) -> set[str]:
    return {leaf for leaf in leaves() if any(leaf == path or leaf.startswith(f"{path}.") for path in paths)}


@pytest.mark.smoke
def test_what_the_fields_of_the_experiment_affect():
    assert set(fields_affecting(Config, "resume")) == set(leaves()) - below(MAY_CHANGE_ON_RESUME)
    assert set(fields_affecting(Config, "prediction")) == below(IDENTITY_OF_PREDICTIONS) | {"data.sequence_length"}
    assert fields_affecting(LlamaConfig, "execution") == LLAMA_EXECUTION
    assert fields_affecting(EvaVitConfig, "execution") == ENCODER_EXECUTION
    assert fields_affecting(HubertConfig, "execution") == ENCODER_EXECUTION


def test_values_are_found_by_path():
    values = values_affecting(Config(seed=7), "prediction")
    assert values["seed"] == 7 and values["lora.targets"] == ["q_proj", "v_proj"] and "mesh.data" not in values


@pytest.mark.parametrize("path", [p for p in leaves() if not p.startswith(("sharding", "mesh"))])
def test_every_bound_and_choice_is_enforced_and_names_its_path(path):
    """Every number has a bound or a reason not to, and a value out of bounds is refused by its path."""
    *groups, name = path.split(".")
    group = Config
    for part in groups:
        group = next(one.type for one in dataclasses.fields(group) if one.name == part)
    one = next(one for one in dataclasses.fields(group) if one.name == name)
    bounds = {key: one.metadata[key] for key in ("ge", "gt", "le", "lt") if key in one.metadata}
    if not bounds and not one.metadata.get("choices"):
        assert one.type in (bool, str, tuple[str, ...]) or path in ("hubert.layer", "lora.alpha"), "no bounds"
        return
    wrong = "none of these" if not bounds else min(value for value in bounds.values()) - 1
    if isinstance(one.default, tuple):
        wrong = [wrong] * max(1, len(one.default))
    data = to_dict(Config())
    target = data
    for part in groups:
        target = target[part]
    target[name] = wrong
    with pytest.raises(UserError, match=rf"^config\.{path}=.*(must be|choose)"):
        from_dict(data)


def test_every_field_is_used():
    """Each is read as an attribute somewhere in the package, or by its name."""
    used = set()
    for path in Path(fields.__file__).parent.rglob("*.py"):
        if path.stem not in ("config", "config_history"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute):
                    used.add(node.attr)
                elif isinstance(node, ast.Constant):
                    used.add(node.value)
    assert {path.rpartition(".")[2] for path in leaves()} - used == set()

"""Experiments of the release before: which fields had other names, and how runs behaved that lack a field."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

RENAMED = {  # old to new; the old names load for one release
    "data.row_length": "data.sequence_length",
    "train.accumulate": "train.grad_accum_steps",
    "train.base": "weights.base",
    "train.eva_vit": "weights.eva_vit",
    "train.ln_vision": "weights.ln_vision",
    "train.init_from": "weights.trained",
}
BEFORE = {"train.loss_average": "token"}  # values of runs that do not have the field yet


def upgrade(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return an experiment with the new names of fields, and with `BEFORE` filled in; warn of old names."""
    data = {name: dict(group) if isinstance(group, Mapping) else group for name, group in data.items()}
    for old, new in RENAMED.items():
        (old_group, old_name), (new_group, new_name) = old.split("."), new.split(".")
        if isinstance(data.get(old_group), dict) and old_name in data[old_group]:
            logging.warning("config.%s is called config.%s now", old, new)
            data.setdefault(new_group, {}).setdefault(new_name, data[old_group].pop(old_name))
    for path, value in BEFORE.items():
        group, name = path.split(".")
        if isinstance(data.get(group), dict):
            data[group].setdefault(name, value)
    if isinstance(data.get("sharding"), list | tuple):
        data["sharding"] = _with_mlp_out(data["sharding"])
    return data


def _with_mlp_out(rules: Sequence[Any]) -> list[Any]:
    """Rules of sharding with one for the output of the MLP, which went by that of "embed" before."""
    of = lambda name: [rule for rule in rules if isinstance(rule, list | tuple) and len(rule) == 2 and rule[0] == name]
    embed = of("embed")
    return list(rules) if of("mlp_out") or not embed else [*rules, ["mlp_out", embed[0][1]]]


def new_path(path: str) -> str:
    """Return the dotted path of a field given on the command line, warning of an old name."""
    if path in RENAMED:
        logging.warning("--config.%s is called --config.%s now", path, RENAMED[path])
    return RENAMED.get(path, path)


def renamed_hint(error: Exception) -> str:
    """Return the new name, as the end of a message, for a config file that gives a group an argument of an old name."""
    found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    new = [new for old, new in RENAMED.items() if found and old.endswith(f".{found[1]}")]
    return f"; it is called {new[0]} now" if new else ""

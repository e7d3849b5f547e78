"""Writes a candidate of the search as a config file: its base experiment, and the fields that it changes."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from emollama_jax.config import Config, load_config
from emollama_jax.errors import UserError
from emollama_jax.plan.plan import ProgramPlan
from emollama_jax.plan.topology import GIB


def overlay(file: Path, base: str, one: ProgramPlan) -> str:
    """The text of a config file: the experiment `base` with a candidate's changes, and its figures in the docstring.

    Raises:
        UserError: the candidate does not fit.
    """
    seconds, topology = one.estimate, one.topology
    if not one.fits:
        raise UserError(f"no candidate fits {topology.name}; the one that lacks least needs {one.peak / GIB:.2f} GiB")
    changes = "\n".join(f"        {line}" for line in _differences(load_config(base), one.config))
    ceiling = "" if topology.chip.clock else ", were all its arithmetic at the peak: a ceiling"
    name = file.stem if file.parent.name == "configs" else file
    return f'''"""{Path(base).stem} on {topology.name}, as `emollama plan --search` chose it.

    emollama plan --config {base} --topology {topology.name} --search --overlay {file}
    emollama plan --config {name} --topology {topology.name}
    emollama train --config {name}

Expected: by compiler estimates (nothing has been measured), {one.peak / GIB:.2f} of \
{topology.chip.memory / GIB:.2f} GiB a chip, {seconds.seconds:,.2f} s a step,
{seconds.rate:,.0f} tokens/s, {100 * seconds.mfu:.0f} % MFU{ceiling}.
"""

import dataclasses

from emollama_jax.config import Config, load_config


def get_config() -> Config:
    base = load_config("{base}")
    return dataclasses.replace(
        base,
{changes}
    )
'''


def _differences(base: Config, config: Config) -> Iterator[str]:
    """The arguments of `dataclasses.replace` that make `config` of `base`."""
    for group in dataclasses.fields(Config):
        before, after = getattr(base, group.name), getattr(config, group.name)
        if before == after:
            continue
        if not dataclasses.is_dataclass(before):
            yield f"{group.name}={after!r},"
            continue
        old, new = dataclasses.asdict(before), dataclasses.asdict(after)
        fields = ", ".join(f"{name}={_literal(value)}" for name, value in new.items() if value != old[name])
        line = f"{group.name}=dataclasses.replace(base.{group.name}, {fields}),"
        if len(line) <= 112:
            yield line
        else:
            yield from (f"{group.name}=dataclasses.replace(", f"    base.{group.name}, {fields}", "),")


def _literal(value: Any) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)

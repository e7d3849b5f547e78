"""The reference of all config fields in Markdown, made from the code: docs/configuration.md.

python -c "from emollama_jax.config_table import config_table; print(config_table(), end='')" > docs/configuration.md
"""

import ast
import dataclasses
import inspect
import textwrap

from emollama_jax.config import Config
from emollama_jax.fields import AFFECTS, describe_range, fields_affecting

INTRODUCTION = """# Configuration

Every field of an experiment (`emollama_jax/config.py`), made from the code. Override one with
`--config.GROUP.FIELD=VALUE`. *Affects* names what depends on the value:

- **resume**: a training run cannot go on with another value;
- **prediction**: the value is part of the identity of predictions, which `--resume` compares;
- **execution**: how the same model is stored or computed, and how fast.
"""
HEADER = "| field | type | default | values | affects | meaning |\n|---|---|---|---|---|---|"


def config_table() -> str:
    """Write the fields of all groups: type, default, range or choices, effects and description."""
    effects = {what: fields_affecting(Config, what) for what in AFFECTS}
    groups = [one for one in dataclasses.fields(Config) if dataclasses.is_dataclass(one.type)]
    plain = [one for one in dataclasses.fields(Config) if one not in groups]
    docs = field_docs(Config)
    parts = [INTRODUCTION, "## The experiment itself\n", HEADER, *(_row(one, "", docs, effects) for one in plain)]
    for group in groups:
        below = field_docs(group.type)
        parts += [f"\n## {group.name}\n", f"{docs[group.name]} {inspect.getdoc(group.type)}\n", HEADER]
        parts += [_row(one, f"{group.name}.", below, effects) for one in dataclasses.fields(group.type)]
    return "\n".join(parts) + "\n"


def field_docs(group: type) -> dict[str, str]:
    """Return the docstrings below the fields of a dataclass, inherited ones too, each as one line."""
    docs: dict[str, str] = {}
    for cls in reversed([base for base in group.__mro__ if dataclasses.is_dataclass(base)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
        for declared, doc in zip(body, body[1:], strict=False):
            if isinstance(declared, ast.AnnAssign) and isinstance(doc, ast.Expr):
                docs[declared.target.id] = " ".join(ast.literal_eval(doc.value).split())
    return docs


def _row(one: dataclasses.Field, group: str, docs: dict[str, str], effects: dict[str, tuple[str, ...]]) -> str:
    kind = one.type.__name__ if isinstance(one.type, type) and one.type.__name__ != "tuple" else str(one.type)
    values = ", ".join(one.metadata.get("choices", ())) or describe_range(one)
    affected = ", ".join(what for what, paths in effects.items() if f"{group}{one.name}" in paths)
    cells = (f"`{one.name}`", f"`{kind}`", f"`{one.default!r}`", values, affected, docs[one.name])
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

"""What PEFT's adapter_config.json says: which linear layers have an adapter, of which rank and scale.

Every setting of the file is computed here, is known not to change what a saved adapter computes, or is refused.
The rules are those of PEFT 0.21 (`check_target_module_exists`, `get_pattern_key` and `LoraLayer.update_layer`).
"""

import re
from dataclasses import dataclass, field
from typing import Any

from emollama_jax.errors import UserError
from emollama_jax.io.json_files import read_json_object
from emollama_jax.io.paths import PathLike, as_path

CONFIG = "adapter_config.json"
MERGE = "merge it into its base with PEFT's merge_and_unload(), save that model and convert it without --adapter"
# Records, and settings that matter while an adapter is made or trained, or beside another that is refused.
HARMLESS = frozenset(
    "auto_mapping base_model_name_or_path revision task_type inference_mode peft_version megatron_core "
    "loftq_config eva_config corda_config lora_ga_config runtime_config qalora_group_size ensure_weight_tying".split()
)
COMPUTED = frozenset(
    "r lora_alpha lora_dropout use_rslora rank_pattern alpha_pattern "
    "target_modules exclude_modules layers_to_transform layers_pattern".split()
)
# Settings with values, beside false and nothing, of which we compute the same as PEFT.
PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none", "all", "lora_only"),  # LLaMA's linear layers have none
    # The others (pissa, olora, corda, loftq, ...) change the base model's weights too.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
OFF = (None, False, [], {})


@dataclass(frozen=True)
class AdapterSettings:
    """The settings of plain LoRA, by PEFT's names."""

    r: int
    lora_alpha: float
    target_modules: str | list[str]
    lora_dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None

    @classmethod
    def parse(cls, given: dict[str, Any]) -> "AdapterSettings":
        """Makes them of values as they are in the file. Raises ValueError for values that make no sense."""
        if missing := [name for name in ("r", "lora_alpha", "target_modules") if name not in given]:
            raise ValueError(f"no {', '.join(missing)}")
        if not given["target_modules"]:
            raise ValueError(f"target_modules={given['target_modules']!r} names no layers")
        for name, kind in (
            ("target_modules", str),
            ("exclude_modules", str),
            ("layers_pattern", str),
            ("layers_to_transform", int),
        ):
            value = given.get(name)
            if not (value is None or type(value) is kind or _are(kind, value)):
                raise ValueError(f"{name}={value!r} names no layers")
        rank = lambda name, value: _number(name, value, int)
        alpha = lambda name, value: float(_number(name, value, int, float))
        pattern = lambda name, parse: {key: parse(f"{name}[{key}]", x) for key, x in (given.get(name) or {}).items()}
        return cls(
            r=rank("r", given["r"]),
            lora_alpha=alpha("lora_alpha", given["lora_alpha"]),
            lora_dropout=float(given.get("lora_dropout") or 0),
            use_rslora=bool(given.get("use_rslora")),
            rank_pattern=pattern("rank_pattern", rank),
            alpha_pattern=pattern("alpha_pattern", alpha),
            **{
                name: given.get(name)
                for name in ("target_modules", "exclude_modules", "layers_pattern", "layers_to_transform")
            },
        )

    def adapter(self, module: str) -> tuple[int, float] | None:
        """The rank r and the α of the adapter on a linear layer, e.g. "model.layers.3.self_attn.q_proj", whose output
        is multiplied by α / r; None where it has none.

        Raises ValueError for a pattern that is no regular expression.
        """
        try:
            if not self._is_target(module):
                return None
            rank = _first_match(self.rank_pattern, module, self.r)
            alpha = _first_match(self.alpha_pattern, module, self.lora_alpha)
        except re.error as error:
            raise ValueError(f"a pattern that is no regular expression: {error.pattern!r}") from error
        return rank, alpha * (rank**0.5 if self.use_rslora else 1.0)  # α / √r = α √r / r

    def _is_target(self, module: str) -> bool:
        if self.exclude_modules and _names(self.exclude_modules, module):
            return False
        if isinstance(self.target_modules, str):  # which layers_to_transform do not limit
            if self.target_modules.lower() == "all-linear":
                return module not in ("lm_head", "model.embed_tokens")
            return _names(self.target_modules, module)
        if module in self.target_modules:
            return True
        return _names(self.target_modules, module) and self._is_layer(module)

    def _is_layer(self, module: str) -> bool:
        """Whether a target's layer is among `layers_to_transform`."""
        layers = self.layers_to_transform
        if layers is None or layers == []:
            return True
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        found = (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module) for pattern in patterns or [r"[^.]*"])
        match = next((match for match in found if match), None)
        return bool(match) and int(match[1]) in (layers if isinstance(layers, list) else [layers])


def read_settings(folder: PathLike) -> AdapterSettings:
    """The settings in a folder.

    Raises:
        UserError: there are none, they make no sense, or they are those of an adapter that the model does not have.
    """
    file = as_path(folder) / CONFIG
    try:
        settings: dict[str, Any] = read_json_object(file)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"no {CONFIG}: {folder}; give the folder that PEFT's save_pretrained wrote") from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the adapter's settings: {file} ({error}); copy it again") from error
    for name, value in settings.items():
        known = name in HARMLESS or name in COMPUTED or value in PLAIN.get(name, OFF) or value in OFF
        if not known or (name == "peft_type" and value != "LORA"):
            raise UserError(f"adapter setting {name}={value!r}: {file}; only plain LoRA is read: {MERGE}")
    try:
        return AdapterSettings.parse({name: value for name, value in settings.items() if name in COMPUTED})
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"unusable adapter settings: {file} ({error}); save the adapter again") from error


def _are(kind: type, values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def _names(given: str | list[str], module: str) -> bool:
    """Whether a regular expression, or a list of ends of paths, names a module."""
    if isinstance(given, str):
        return re.fullmatch(given, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in given)


def _first_match(patterns: dict[str, Any], module: str, otherwise: Any) -> Any:
    """The value of the first pattern, of `rank_pattern` or `alpha_pattern`, that is for a module."""
    found = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(found, otherwise)


def _number(name: str, value: Any, *kinds: type) -> Any:
    """A finite number above 0. Raises ValueError for anything else."""
    if type(value) not in kinds or not 0 < value < float("inf"):
        raise ValueError(f"{name}={value!r} is no number above 0")
    return value

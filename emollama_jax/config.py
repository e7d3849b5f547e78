"""The whole experiment as nested frozen dataclasses, and the ways in and out of them.

    load_config("tiny")                                  from a file of configs/ or any path
    parse_flags(["--config=tiny", "--config.seed=7"])    the same with overrides from a command line
    to_dict(config), from_dict(data)                     to and from JSON, as checkpoints keep it

A group checks its own values in `__post_init__`; its ValueErrors begin with the field's path in the experiment
(`mesh.data=0: ...`) and reach the user as one line.
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from absl import flags
from ml_collections import ConfigDict, config_flags

from emollama_jax.errors import UserError
from emollama_jax.media.clip import ClipConfig
from emollama_jax.models.emotion_llama import TRAINABLE, num_image_tokens
from emollama_jax.models.eva_vit import EvaVitConfig
from emollama_jax.models.hubert import HubertConfig
from emollama_jax.models.llama import LlamaConfig
from emollama_jax.models.lora import LoRAConfig
from emollama_jax.models.mae import MaeConfig
from emollama_jax.models.projectors import ProjectorsConfig
from emollama_jax.models.videomae import VideoMaeConfig
from emollama_jax.text.prompts import PromptConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis, from the slowest to the fastest interconnect; one may be -1: all that are left."""

    data: int = 1
    """Copies of the model, each with its own part of the batch."""
    fsdp: int = 1
    """Devices that share one copy's parameters and each take a part of its batch."""
    tensor: int = 1
    """Devices that share the heads, the MLP and the vocabulary of every layer."""

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(f"mesh.{name}={size}: give a number of devices, or -1 for all that are left")
        if list(sizes.values()).count(-1) > 1:
            raise ValueError(f"mesh={sizes}: only one axis may be -1")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """What is read, and how it becomes batches."""

    train: tuple[str, ...] = ()
    """The prepared data sets to train on, as FOLDER:SPLIT."""
    weights: tuple[float, ...] = ()
    """How much of the mixture each is, relative to the others; none given is by their numbers of clips."""
    eval: tuple[str, ...] = ()
    """Those to evaluate on."""
    sequence_length: int = 2048
    """Tokens T of a row; several clips are packed into one."""
    clips_per_row: int = 6
    """Clips K of a row, at most."""
    batch_rows: int = 16
    """Rows B of a batch, over all processes."""
    packing_rows: int = 32
    """Rows that are filled at the same time: more leave less padding and hold more in memory."""
    workers: int = 0
    """Processes that read and decode, beside the training process; 0 is none, and threads of its own do it."""
    read_ahead: int = 64
    """Clips that are read before they are needed, by all that read together."""
    prefetch: int = 2
    """Batches that wait on the devices."""

    def __post_init__(self):
        for name in ("sequence_length", "clips_per_row", "batch_rows", "packing_rows", "read_ahead", "prefetch"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)}: must be at least 1")
        if self.workers < 0:
            raise ValueError(f"data.workers={self.workers}: must be 0 (none) or more")
        if self.weights and (len(self.weights) != len(self.train) or min(self.weights) <= 0):
            raise ValueError(f"data.weights={self.weights}: give one number above 0 for each of data.train")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsConfig:
    """Where weights are read from: training, extraction, prediction and evaluation all look here."""

    base: str = "weights/llama2"
    """The language model: a base checkpoint, as emollama convert writes it."""
    eva_vit: str = "weights/eva_vit_g.pth"
    """EVA-ViT, the encoder of the frame; data of image tokens needs none."""
    ln_vision: str = ""
    """The norm after EVA-ViT, where a file of its own holds it."""
    mae: str = "weights/vit-mae-large"
    """MAE, the encoder of the face."""
    videomae: str = "weights/videomae-large"
    """VideoMAE, the encoder of the motion."""
    hubert: str = "weights/chinese-hubert-large"
    """HuBERT, the encoder of the voice."""
    trained: str = ""
    """Adapters and projectors: a run's folder, a .pth or a PEFT folder. Training starts from them, prediction uses
    them; empty for new ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How the adapters and projectors are trained; the defaults are the reference's recipe: 30,000 steps of 4 clips."""

    workdir: str = ""
    """The run's folder: a path, or gs://BUCKET/FOLDER. A run that is there already goes on."""
    steps: int = 30_000
    """Steps, each on one batch of packed rows."""
    warmup_steps: int = 1000
    """Steps in which the learning rate rises from warmup_from."""
    warmup_from: float = 1e-6
    """Learning rate of the first step."""
    learning_rate: float = 1e-5
    """Learning rate after the warm-up."""
    final_rate: float = 1e-6
    """Learning rate at the end of the cosine."""
    weight_decay: float = 0.05
    """AdamW's, on matrices; vectors do not decay."""
    beta1: float = 0.9
    """Decay of AdamW's mean of gradients."""
    beta2: float = 0.999
    """Decay of AdamW's mean of squared gradients."""
    epsilon: float = 1e-8
    """AdamW's, beside the root of that mean."""
    clip_norm: float = 0.0
    """Largest norm of a gradient, which is scaled down to it; 0 is no clipping."""
    loss_average: str = "clip"
    """What counts alike in the loss: clip (every clip, whose targets share one weight, as in the reference's recipe of
    one clip a GPU) or token (every target token, so that a caption counts as much as many labels)."""
    grad_accum_steps: int = 1
    """Parts that a batch's rows are worked through in, one after another, to save memory."""
    non_finite: str = "stop"
    """What a loss or gradient that is not finite does: stop (end the run) or skip (leave the step out, and end the run
    after ten in a row)."""
    validation: tuple[str, ...] = ()
    """Data sets to validate on, as FOLDER:SPLIT; never a test split."""
    validation_interval: int = 1000
    """Steps between validations."""
    best_metric: str = "loss"
    """Which of the validation's metrics says what is best: the lowest loss, or the highest of any other."""
    patience: int = 0
    """Validations without a new best after which the run ends; 0 never ends it."""
    log_interval: int = 10
    """Steps between lines of metrics."""
    checkpoint_interval: int = 500
    """Steps between checkpoints."""
    keep: int = 2
    """The newest checkpoints that are kept, beside the best."""
    compile_cache: str = "~/.cache/emollama_jax/compiled"
    """Folder of compiled programs, for later starts; JAX_COMPILATION_CACHE_DIR goes before it."""
    profile: tuple[int, ...] = ()
    """First and last step of a profiler trace, written into the run's folder."""

    def __post_init__(self):
        least = {"steps": 1, "warmup_steps": 0, "grad_accum_steps": 1, "validation_interval": 1, "patience": 0}
        least |= {"log_interval": 1, "checkpoint_interval": 1, "keep": 2, "clip_norm": 0, "weight_decay": 0}
        least |= {"warmup_from": 0, "learning_rate": 0, "final_rate": 0}
        for name, lowest in least.items():
            if not getattr(self, name) >= lowest:
                raise ValueError(f"train.{name}={getattr(self, name)}: must be at least {lowest}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)}: must be at least 0 and below 1")
        if not self.epsilon > 0:
            raise ValueError(f"train.epsilon={self.epsilon}: must be above 0")
        if self.warmup_steps >= self.steps:
            raise ValueError(f"train.warmup_steps={self.warmup_steps}: must be below train.steps={self.steps}")
        if self.non_finite not in ("stop", "skip"):
            raise ValueError(f"train.non_finite={self.non_finite!r}: choose one of stop, skip")
        if self.loss_average not in ("clip", "token"):
            raise ValueError(f"train.loss_average={self.loss_average!r}: choose one of clip, token")
        if tests := [path for path in self.validation if path.rpartition(":")[2].startswith("test")]:
            raise ValueError(
                f"train.validation: {tests[0]} is a test split; hold clips of the train split out for this"
            )
        if self.profile and not (len(self.profile) == 2 and 1 <= self.profile[0] <= self.profile[1]):
            raise ValueError(f"train.profile={self.profile}: give the first and the last step, as in (20, 25)")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig:
    """How answers are decoded; the defaults are the released model's: greedy, up to 500 tokens."""

    max_new_tokens: int = 500
    """Longest answer in tokens."""
    temperature: float = 0.0
    """Divisor of the logits before sampling; 0 takes the most likely token."""
    top_p: float = 1.0
    """Sampling keeps the most likely tokens whose probabilities reach this sum."""
    repetition_penalty: float = 1.0
    """Factor by which a token already in the prompt or the answer loses; 1 is none."""

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"generate.max_new_tokens={self.max_new_tokens}: must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"generate.temperature={self.temperature}: must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"generate.top_p={self.top_p}: must be above 0 and at most 1")
        if self.repetition_penalty <= 0:
            raise ValueError(f"generate.repetition_penalty={self.repetition_penalty}: must be above 0")


DEFAULT_SHARDING = (
    ("batch", ("data", "fsdp")),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("layers", None),
    ("seq", None),
    ("lora_rank", None),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One experiment."""

    llama: LlamaConfig = LlamaConfig()
    """The language model."""
    lora: LoRAConfig = LoRAConfig()
    """Its adapters."""
    eva_vit: EvaVitConfig = EvaVitConfig()
    """The encoder of the frame."""
    mae: MaeConfig = MaeConfig()
    """The encoder of the face."""
    videomae: VideoMaeConfig = VideoMaeConfig()
    """The encoder of the motion."""
    hubert: HubertConfig = HubertConfig()
    """The encoder of the voice."""
    projectors: ProjectorsConfig = ProjectorsConfig()
    """From the encoders' outputs to soft tokens."""
    trainable: tuple[str, ...] = TRAINABLE
    """What is trained: any of lora, image_proj, mae_proj, videomae_proj, hubert_proj and cls_proj."""
    clip: ClipConfig = ClipConfig()
    """How a video is read."""
    prompt: PromptConfig = PromptConfig()
    """What is asked about a clip."""
    data: DataConfig = DataConfig()
    """The data."""
    weights: WeightsConfig = WeightsConfig()
    """Files of weights."""
    train: TrainConfig = TrainConfig()
    """Training."""
    mesh: MeshConfig = MeshConfig()
    """The devices."""
    sharding: tuple[tuple[str, str | tuple[str, ...] | None], ...] = DEFAULT_SHARDING
    """The mesh axes that each logical axis of parameters and batch is split over; None keeps it whole."""
    generate: GenerateConfig = GenerateConfig()
    """Decoding."""
    seed: int = 42
    """Origin of all randomness: initial adapters, dropout, sampling."""

    def __post_init__(self):
        if unknown := [part for part in self.trainable if part not in TRAINABLE]:
            raise ValueError(f"trainable: no part {unknown[0]!r}; choose among {', '.join(TRAINABLE)}")
        num_image_tokens(self.eva_vit, self.projectors)
        logical = [name for name, _ in DEFAULT_SHARDING]
        if sorted(name for name, _ in self.sharding) != sorted(logical):
            raise ValueError(f"sharding={self.sharding}: give one rule for each of {', '.join(logical)}")
        mesh_axes = [field.name for field in dataclasses.fields(MeshConfig)]
        for name, axes in self.sharding:
            axes = (axes,) if isinstance(axes, str) else axes or ()
            if not set(axes) <= set(mesh_axes) or len(set(axes)) < len(axes):
                raise ValueError(f"sharding: {name!r} over {axes}; choose among the mesh axes {', '.join(mesh_axes)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed}: must be at least 0 and below 2**32")


def load_config(name_or_path: str) -> Config:
    """What `get_config()` of a config file returns.

    A name without folder or suffix is looked for in ./configs, then among the configs that come with the package.

    Raises:
        UserError: there is no such file, it fails, or it does not return a Config.
    """
    path = _find(name_or_path)
    spec = importlib.util.spec_from_file_location(f"emollama_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:  # the file is its author's: whatever it raises is for them to read
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise UserError(f"{path}: get_config() returned {config!r}; it must return an emollama_jax.config.Config")
    try:
        return from_dict(to_dict(config))  # Python let any type through
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _find(name_or_path: str) -> Path:
    package = Path(__file__).parent
    in_wheel, in_checkout = package / "configs", package.parent / "configs"
    folders = (in_wheel if in_wheel.is_dir() else in_checkout, Path("configs"))
    known = {file.stem: file for folder in folders for file in folder.glob("*.py")}
    path = Path(name_or_path)
    if path.suffix != ".py" and len(path.parts) == 1:
        path = known.get(name_or_path, path)
    if path.suffix == ".py" and path.is_file():
        return path
    near = difflib.get_close_matches(path.stem, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"{name_or_path}: no such config; {hint}give a .py file or one of {', '.join(sorted(known))}")


def to_dict(config: Config) -> dict[str, Any]:
    """The experiment in JSON's types; `from_dict` gives back an equal Config."""
    return _to_json(dataclasses.asdict(config))


def _to_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_json(item) for key, item in value.items()}
    return [_to_json(item) for item in value] if isinstance(value, tuple) else value


def from_dict(data: Mapping[str, Any]) -> Config:
    """The experiment written by `to_dict`, also after a round through JSON.

    Raises:
        UserError: a field is unknown, missing, of the wrong type or out of range; it is named by its path.
    """
    return _build(Config, data, "config")


def parse_flags(argv: Sequence[str], default: Config | None = None) -> tuple[Config, list[str]]:
    """Takes `--config NAME_OR_PATH` and the overrides `--config.GROUP.FIELD=VALUE` out of a command line.

    A value may also be the next argument. A tuple is written as in Python, '("q_proj", "v_proj")', one of strings also
    as q_proj,v_proj. Of an argument given twice the last counts. Without a `--config` the experiment is `default`.

    Returns:
        The experiment with the overrides, and the remaining arguments in their order; all from `--` on remain.

    Raises:
        UserError: there is no experiment, or an override names no field or has a value the field cannot take.
    """
    values, rest, arguments = {}, [], iter(argv)
    for argument in arguments:
        flag, given, value = argument.partition("=")
        if argument == "--":
            rest += [argument, *arguments]
        elif flag == "--config" or flag.startswith("--config."):
            values[flag] = value if given else next(arguments, None)
            if not values[flag]:
                raise UserError(f"{flag}: no value given; write {flag}=VALUE")
        else:
            rest.append(argument)
    name = values.pop("--config", None)
    if name is None and default is None:
        raise UserError("--config: no experiment given; name one, as in --config=tiny")
    return _override(load_config(name) if name else default, values), rest


def _override(config: Config, values: dict[str, str]) -> Config:
    """`config` with the fields that the flags `--config.GROUP.FIELD` name set to the values written."""
    argv, hints = [], {flag: _flag_type(flag) for flag in values}
    for flag, value in values.items():
        is_words = hints[flag] == tuple[str, ...] and re.fullmatch(r"\w+(,\w+)+", value)
        argv += [f"{flag}={item}" for item in (value.split(",") if is_words else [value])]
    holder, tree = flags.FlagValues(), ConfigDict(dataclasses.asdict(config))
    config_flags.DEFINE_config_dict("config", tree, flag_values=holder, sys_argv=argv)
    try:
        holder(["", *argv])
    except flags.IllegalFlagValueError as error:
        flag = re.search(r"--config[.\w]+", str(error)).group()
        raise _wrong_type(flag, hints[flag], values[flag]) from error
    return _build(Config, holder.config.to_dict(), "--config")


def _flag_type(flag: str) -> Any:
    """The type of the field that `--config.GROUP.FIELD` names."""
    where, *path = flag.split(".")
    group = Config
    for i, name in enumerate(path):
        hint = get_type_hints(group).get(name)
        if hint is None:
            raise _no_such_field(where, ".".join(path[i:]), group)
        where = f"{where}.{name}"
        if not dataclasses.is_dataclass(hint):
            if path[i + 1 :]:
                raise UserError(f"{flag}: {where} has no fields; write {where}=VALUE")
            return hint
        group = hint
    raise UserError(f"{flag}: a group; set its fields one by one: {', '.join(get_type_hints(group))}")


def _build(group: type, data: Any, where: str) -> Any:
    """The dataclass `group` from a mapping whose types are checked, field by field."""
    if not isinstance(data, Mapping):
        raise _wrong_type(where, group, data)
    hints = get_type_hints(group)
    for name in data:
        if name not in hints:
            raise _no_such_field(where, name, group)
    for name in hints:
        if name not in data:
            raise UserError(f"{where}.{name}: missing; every field must be given")
    fields = {name: _read(hint, data[name], f"{where}.{name}") for name, hint in hints.items()}
    try:
        return group(**fields)
    except ValueError as error:  # begins with the field's path in the experiment
        raise UserError(f"{where.split('.')[0]}.{error}") from error


def _read(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint`; lists become tuples and whole numbers floats where the type asks for it."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    if isinstance(hint, types.UnionType):
        for alternative in get_args(hint):
            with contextlib.suppress(UserError):
                return _read(alternative, value, where)
    elif get_origin(hint) is tuple and isinstance(value, list | tuple):
        hints = get_args(hint)
        hints = hints[:1] * len(value) if hints[-1] is Ellipsis else hints
        if len(hints) == len(value):
            return tuple(_read(*pair, f"{where}[{i}]") for i, pair in enumerate(zip(hints, value, strict=True)))
    elif hint is float and type(value) is int:
        return float(value)
    elif type(value) is hint:
        return value
    raise _wrong_type(where, hint, value)


def _wrong_type(where: str, hint: Any, value: Any) -> UserError:
    return UserError(f"{where}: expected {hint.__name__ if isinstance(hint, type) else hint}, not {value!r}")


def _no_such_field(where: str, name: str, group: type) -> UserError:
    paths = _paths(group)
    near = [path for path in paths if path.endswith(f".{name}")] or difflib.get_close_matches(name, paths, n=1)
    remedy = (
        f"did you mean {' or '.join(f'{where}.{path}' for path in near)}?"
        if near
        else f"{where} has {', '.join(get_type_hints(group))}"
    )
    return UserError(f"{where}.{name}: no such field; {remedy}")


def _paths(group: type) -> list[str]:
    """The dotted paths of all groups and fields below `group`."""
    paths = []
    for name, hint in get_type_hints(group).items():
        paths += [name, *(f"{name}.{below}" for below in (_paths(hint) if dataclasses.is_dataclass(hint) else []))]
    return paths

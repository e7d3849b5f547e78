"""The whole experiment as nested frozen dataclasses, and the ways in and out of them.

    load_config("tiny")                                  from a file of configs/ or any path
    parse_flags(["--config=tiny", "--config.seed=7"])    the same with overrides from a command line
    to_dict(config), from_dict(data)                     to and from JSON, as checkpoints keep it
    values_affecting(config, "resume")                   the values of the fields that affect something

Range, choices and effects of a field are declared with the field (`fields.field`). A group checks its values when it is
made; its ValueErrors start with the field (`data=0: ...`), and the path in the experiment is prepended here.
"""

import dataclasses
import difflib
import functools
import importlib.util
import operator
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from emollama_jax.config_history import new_path, renamed_hint, upgrade
from emollama_jax.config_parsing import build, field_type, parse_value
from emollama_jax.errors import UserError
from emollama_jax.fields import check_fields, field, fields_affecting
from emollama_jax.media.clip import ClipConfig
from emollama_jax.models.emotion_llama import TRAINABLE, num_image_tokens
from emollama_jax.models.eva_vit import EvaVitConfig
from emollama_jax.models.hubert import HubertConfig
from emollama_jax.models.llama import LlamaConfig
from emollama_jax.models.lora import LoRAConfig
from emollama_jax.models.mae import MaeConfig
from emollama_jax.models.projectors import ProjectorsConfig
from emollama_jax.models.videomae import VideoMaeConfig
from emollama_jax.text.labels import METRICS
from emollama_jax.text.prompts import PromptConfig

RESUME, PREDICTION, EXECUTION = ("resume",), ("prediction",), ("execution",)
PARTIAL_VIEWS = ("A", "V", "T", "AV", "AT", "VT")  # one or two of audio, video and text


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis, from the slowest to the fastest interconnect; one may be -1: all that are left."""

    data: int = field(1, ge=-1, affects=EXECUTION)
    """Copies of the model, each with its own part of the batch."""
    fsdp: int = field(1, ge=-1, affects=EXECUTION)
    """Devices that share one copy's parameters and each take a part of its batch."""
    tensor: int = field(1, ge=-1, affects=EXECUTION)
    """Devices that share the heads, the MLP and the vocabulary of every layer."""

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(f"{name}={size}: give a number of devices, or -1 for all that are left")
        if list(sizes.values()).count(-1) > 1:
            raise ValueError(f"{', '.join(f'{name}={size}' for name, size in sizes.items())}: only one axis may be -1")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Data sets, and how their clips become batches."""

    train: tuple[str, ...] = field((), affects=())
    """Prepared data sets to train on, as FOLDER:SPLIT."""
    weights: tuple[float, ...] = field((), gt=0, affects=RESUME)
    """Share of each data set in the mixture, relative to the others; empty: by their numbers of clips."""
    eval: tuple[str, ...] = field((), affects=())
    """Prepared data sets to evaluate on, as FOLDER:SPLIT."""
    sequence_length: int = field(2048, ge=1)
    """Tokens T of a row; several clips are packed into one."""
    clips_per_row: int = field(6, ge=1, affects=RESUME)
    """Most clips K of a row."""
    batch_rows: int = field(16, ge=1, affects=RESUME)
    """Rows B of a batch, over all processes."""
    packing_rows: int = field(32, ge=1, affects=RESUME)
    """Rows filled at the same time: more leave less padding and hold more in memory."""
    modality_dropout: float = field(0.0, ge=0, le=1, affects=RESUME)
    """Share of the training clips that are shown without one or two of face, voice and words, drawn anew each time."""
    dropout_view_weights: tuple[float, ...] = field((), ge=0, affects=RESUME)
    """How often each view of such clips is shown, relative to the others: A, V, T, AV, AT and VT, of the modalities
    audio, video and text; empty: all equally often."""
    workers: int = field(0, ge=0, affects=EXECUTION)
    """Processes that read and decode, beside the training process; 0: threads of the training process."""
    read_ahead: int = field(64, ge=1, affects=EXECUTION)
    """Clips read before they are needed, by all readers together."""
    prefetch: int = field(2, ge=1, affects=EXECUTION)
    """Batches that wait on the devices."""

    def __post_init__(self):
        check_fields(self)
        if self.weights and len(self.weights) != len(self.train):
            raise ValueError(f"weights={self.weights}: give one number above 0 for each of data.train")
        weights = self.dropout_view_weights
        if weights and (len(weights) != len(PARTIAL_VIEWS) or not sum(weights)):
            raise ValueError(
                f"dropout_view_weights={weights}: give six numbers, for {', '.join(PARTIAL_VIEWS)}, not all 0"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsConfig:
    """Where weights are read from: training, extraction, prediction and evaluation all look here. Each is a path, an
    address gs://BUCKET/PATH, or the name of a model of the Hugging Face hub (ORG/NAME, ORG/NAME@REVISION)."""

    base: str = "weights/llama2"
    """The language model: a base checkpoint, as emollama convert writes it."""
    eva_vit: str = "weights/eva_vit_g.pth"
    """EVA-ViT, the encoder of the frame; not needed for data of image tokens."""
    ln_vision: str = ""
    """The norm after EVA-ViT, if in a file of its own."""
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

    workdir: str = field("", affects=())
    """The run's folder: a path, or gs://BUCKET/FOLDER. A run that is there already goes on."""
    steps: int = field(30_000, ge=1, affects=())
    """Steps, each on one batch of packed rows. A resumed run follows the learning rate of the new number."""
    warmup_steps: int = field(1000, ge=0)
    """Steps in which the learning rate rises from warmup_from."""
    warmup_from: float = field(1e-6, ge=0)
    """Learning rate of the first step."""
    learning_rate: float = field(1e-5, ge=0)
    """Learning rate after the warm-up."""
    final_rate: float = field(1e-6, ge=0)
    """Learning rate at the end of the cosine."""
    weight_decay: float = field(0.05, ge=0)
    """Weight decay of AdamW, on matrices; vectors do not decay."""
    beta1: float = field(0.9, ge=0, lt=1)
    """Decay of AdamW's mean of gradients."""
    beta2: float = field(0.999, ge=0, lt=1)
    """Decay of AdamW's mean of squared gradients."""
    epsilon: float = field(1e-8, gt=0)
    """Added by AdamW to the root of the mean of squared gradients."""
    clip_norm: float = field(0.0, ge=0)
    """Largest norm of a gradient, which is scaled down to it; 0: no clipping."""
    center_projectors: bool = False
    """Whether the projectors are trained as if their inputs' mean over the training clips were subtracted, and new ones
    begin at the size of embeddings: for encoders whose outputs differ little (see `train/projector_inputs.py`)."""
    loss_average: str = field("clip", choices=("clip", "token"))
    """What counts alike in the loss: clip (every clip, whose targets share one weight, as in the reference's recipe of
    one clip a GPU) or token (every target token, so that a caption counts as much as many labels)."""
    grad_accum_steps: int = field(1, ge=1)
    """Parts into which a batch's rows are split, worked through one after another, to save memory."""
    loss_scale: float = field(1.0, gt=0)
    """Factor of the loss while gradients are computed, and then of these no more. In float16 those of deep layers would
    be rounded to 0 without it: give a power of 2, such as 4096 (`llama.compute_dtype`)."""
    non_finite: str = field("stop", choices=("stop", "skip"), affects=())
    """Reaction to a loss or gradient that is not finite: stop (end the run) or skip (leave the step out, and end the
    run after ten in a row)."""
    validation: tuple[str, ...] = field((), affects=())
    """Data sets to validate on, as FOLDER:SPLIT; never a test split."""
    validation_interval: int = field(1000, ge=1, affects=())
    """Steps between validations."""
    best_metric: str = field("loss", choices=("loss", *METRICS), affects=())
    """Metric of the validation that decides which checkpoint is best: the lowest loss, or the highest metric of labels,
    such as weighted_f1, macro_f1, uar or war."""
    patience: int = field(0, ge=0, affects=())
    """Validations without a new best after which the run ends; 0: never."""
    log_interval: int = field(10, ge=1, affects=())
    """Steps between lines of metrics."""
    checkpoint_interval: int = field(500, ge=1, affects=())
    """Steps between checkpoints."""
    keep: int = field(2, ge=2, affects=())
    """Newest checkpoints to keep, beside the best."""
    compile_cache: str = field("~/.cache/emollama_jax/compiled", affects=())
    """Folder of compiled programs, for later starts; JAX_COMPILATION_CACHE_DIR takes precedence."""
    profile: tuple[int, ...] = field((), ge=1, affects=())
    """First and last step of a profiler trace, written into the run's folder."""

    def __post_init__(self):
        check_fields(self)
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps}: must be below train.steps={self.steps}")
        if tests := [path for path in self.validation if path.rpartition(":")[2].startswith("test")]:
            raise ValueError(f"validation: {tests[0]} is a test split; hold clips of the train split out for this")
        if self.profile and not (len(self.profile) == 2 and self.profile[0] <= self.profile[1]):
            raise ValueError(f"profile={self.profile}: give the first and the last step, as in (20, 25)")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig:
    """How answers are decoded; the defaults are the released model's: greedy, up to 500 tokens."""

    max_new_tokens: int = field(500, ge=1)
    """Longest answer in tokens."""
    temperature: float = field(0.0, ge=0)
    """Divisor of the logits before sampling; 0 takes the most likely token."""
    top_p: float = field(1.0, gt=0, le=1)
    """Sampling keeps the most likely tokens whose probabilities reach this sum."""
    repetition_penalty: float = field(1.0, gt=0)
    """Factor by which a token already in the prompt or the answer loses; 1: none."""

    def __post_init__(self):
        check_fields(self)


DEFAULT_SHARDING = (
    ("batch", ("data", "fsdp")),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("mlp_out", "fsdp"),
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
    """The language model's adapters."""
    eva_vit: EvaVitConfig = EvaVitConfig()
    """EVA-ViT, the encoder of the frame."""
    mae: MaeConfig = field(MaeConfig(), affects=EXECUTION)
    """MAE, the encoder of the face."""
    videomae: VideoMaeConfig = field(VideoMaeConfig(), affects=EXECUTION)
    """VideoMAE, the encoder of the motion."""
    hubert: HubertConfig = field(HubertConfig(), affects=EXECUTION)
    """HuBERT, the encoder of the voice."""
    projectors: ProjectorsConfig = ProjectorsConfig()
    """The maps from the encoders' outputs to soft tokens."""
    trainable: tuple[str, ...] = field(TRAINABLE, choices=TRAINABLE, affects=RESUME)
    """Parts of the model that are trained."""
    clip: ClipConfig = field(ClipConfig(), affects=PREDICTION)
    """How a video is read."""
    prompt: PromptConfig = PromptConfig()
    """What the model is asked about a clip."""
    data: DataConfig = DataConfig()
    """Data sets and batches."""
    weights: WeightsConfig = field(WeightsConfig(), affects=())
    """Files of weights."""
    train: TrainConfig = field(TrainConfig(), affects=RESUME)
    """Training."""
    mesh: MeshConfig = MeshConfig()
    """Devices."""
    sharding: tuple[tuple[str, str | tuple[str, ...] | None], ...] = field(DEFAULT_SHARDING, affects=EXECUTION)
    """Mesh axes that each logical axis of parameters and batch is split over; None keeps it whole."""
    generate: GenerateConfig = field(GenerateConfig(), affects=PREDICTION)
    """Decoding."""
    seed: int = field(42, ge=0, lt=2**32)
    """Origin of all randomness: initial adapters, dropout, sampling."""

    def __post_init__(self):
        check_fields(self)
        try:
            num_image_tokens(self.eva_vit, self.projectors)
        except ValueError as error:
            raise ValueError(f"projectors.{error}") from error
        logical = [name for name, _ in DEFAULT_SHARDING]
        if sorted(name for name, _ in self.sharding) != sorted(logical):
            raise ValueError(f"sharding={self.sharding}: give one rule for each of {', '.join(logical)}")
        mesh_axes = [axis.name for axis in dataclasses.fields(MeshConfig)]
        for name, axes in self.sharding:
            axes = (axes,) if isinstance(axes, str) else axes or ()
            if not set(axes) <= set(mesh_axes) or len(set(axes)) < len(axes):
                raise ValueError(f"sharding: {name!r} over {axes}; choose among the mesh axes {', '.join(mesh_axes)}")


def load_config(name_or_path: str) -> Config:
    """Load the experiment that `get_config()` of a config file returns.

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
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"{path}:{lines[-1]}" if lines else str(path)
        raise UserError(f"{where}: {type(error).__name__}: {error}{renamed_hint(error)}") from error
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
    """Convert an experiment to JSON's types; `from_dict` gives back an equal Config."""
    return _to_json(dataclasses.asdict(config))


def _to_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_json(item) for key, item in value.items()}
    return [_to_json(item) for item in value] if isinstance(value, tuple) else value


def from_dict(data: Mapping[str, Any]) -> Config:
    """Read an experiment written by `to_dict`, also after a round through JSON, and also by the release before.

    Missing fields have the values of before (see `config_history`) or their defaults; old names load with a warning.

    Raises:
        UserError: a field is unknown, of the wrong type or out of range; it is named by its path.
    """
    return build(Config, upgrade(data), "config")


def values_affecting(config: Config, what: str) -> dict[str, Any]:
    """Return the values, in JSON's types, of the fields that affect `what` (see `fields.field`), by dotted path."""
    tree = to_dict(config)
    return {path: functools.reduce(operator.getitem, path.split("."), tree) for path in fields_affecting(Config, what)}


def parse_flags(argv: Sequence[str], default: Config | None = None) -> tuple[Config, list[str]]:
    """Take `--config NAME_OR_PATH` and the overrides `--config.GROUP.FIELD=VALUE` out of a command line.

    A value may also be the next argument. A tuple is written as in Python, '("q_proj", "v_proj")', one of strings also
    as q_proj,v_proj. Of an argument given twice the last counts. Without a `--config` the experiment is `default`.

    Returns:
        The experiment with the overrides, and the remaining arguments in their order; all from `--` on remain.

    Raises:
        UserError: there is no experiment, or an override names no field or has a value the field cannot take.
    """
    name, values, rest, arguments = None, {}, [], iter(argv)
    for argument in arguments:
        flag, given, value = argument.partition("=")
        if argument == "--":
            rest += [argument, *arguments]
        elif flag == "--config" or flag.startswith("--config."):
            value = value if given else next(arguments, None)
            if not value:
                raise UserError(f"{flag}: no value given; write {flag}=VALUE")
            path = flag.removeprefix("--config").removeprefix(".")
            if path:
                values[new_path(path)] = value
            else:
                name = value
        else:
            rest.append(argument)
    if name is None and default is None:
        raise UserError("--config: no experiment given; name one, as in --config=tiny")
    parsed = {
        path: parse_value(field_type(Config, path, "--config"), text, f"--config.{path}")
        for path, text in values.items()
    }
    tree = ConfigDict(dataclasses.asdict(load_config(name) if name else default), type_safe=False)
    tree.update_from_flattened_dict(parsed)
    return build(Config, tree.to_dict(), "--config"), rest

"""A trained run, opened: its experiment, its weights, and what it was trained on.

    run = Run.open("runs/stage2")
    run.config, run.provenance.frame_rules, run.values()

`Run.open` takes the newest sound checkpoint, newest first; older ones are not read. It verifies what is loaded: the
trained parameters and what the checkpoint says of itself by their SHA-256. The optimiser's arrays, which only a resumed
run reads, are verified by their sizes here and by their SHA-256 in `Checkpoints`.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from etils import epath
from flax import nnx

from emollama_jax.config import Config, MeshConfig, from_dict
from emollama_jax.errors import UserError
from emollama_jax.io.file_list import find_damage
from emollama_jax.io.paths import as_path
from emollama_jax.models.eva_vit import EvaVit
from emollama_jax.runs.checkpoint_files import (
    CHECKPOINTS,
    META,
    PARAMS,
    STATE,
    find_steps,
    has_old_layout,
    is_checkpoint,
    read_fixed,
    read_meta,
    read_params,
)
from emollama_jax.runs.identity import check_same, file_fingerprint, is_file_fingerprint, upgrade_meta
from emollama_jax.text.prompts import FEATURES
from emollama_jax.weights.base_checkpoint import fingerprint_of
from emollama_jax.weights.engine import param_values
from emollama_jax.weights.model_identity import ModelIdentity
from emollama_jax.weights.trained import TrainedWeights

_log = logging.getLogger(__name__).warning
ANY_ENCODERS = "take them all the same with --any-encoders"


@dataclass(frozen=True)
class Provenance:
    """What a run was trained on.

    Attributes:
        encoders: fingerprints by encoder: mae, videomae, hubert, eva_vit and ln_vision, as far as they are known. They
            are of files (`is_file_fingerprint`) where the run encoded frames itself, otherwise of parameters.
        frame_rules: how the frames of its data were chosen; empty where that is not known.
        labels: the label set of its prompts.
        base: the language model.
    """

    encoders: Mapping[str, str]
    frame_rules: tuple[str, ...]
    labels: tuple[str, ...]
    base: ModelIdentity


@dataclass(frozen=True)
class Run:
    """A trained run at one of its checkpoints. `Run.open` verifies; the constructor takes a checkpoint that is sound.

    Attributes:
        folder: the checkpoint's folder.
        path: the run's folder or checkpoint as it was named, for messages.
    """

    folder: epath.Path
    path: epath.PathLike

    @staticmethod
    def is_run(path: epath.PathLike) -> bool:
        """Returns whether a path is a run's folder or one of its checkpoints."""
        return (as_path(path) / CHECKPOINTS).is_dir() or is_checkpoint(as_path(path))

    @classmethod
    def open(cls, path: epath.PathLike, log: Callable[[str], None] = _log) -> "Run":
        """Opens a run at its newest sound checkpoint, or the checkpoint that `path` is.

        Args:
            log: is told of each checkpoint that is skipped: unfinished or damaged.

        Raises:
            UserError: there is no sound checkpoint, or the one named is damaged.
        """
        where = as_path(path)
        if is_checkpoint(where):
            if problem := _find_damage(where):
                raise UserError(f"{problem}: {path}; name another checkpoint of the run")
            return cls(where, path)
        for step in reversed(find_steps(where)):
            folder = where / CHECKPOINTS / str(step)
            problem = _find_damage(folder)
            if problem is None:
                return cls(folder, path)
            log(f"checkpoint of step {step} is {problem}: {folder}; skipped")
        raise UserError(f"no sound checkpoint: {path}; train on, or give another run")

    @classmethod
    def find(cls, path: epath.PathLike | None, log: Callable[[str], None] = _log) -> "Run | None":
        """Opens what `path` names if that is a run; None for other trained weights, and for none."""
        return cls.open(path, log) if path and cls.is_run(path) else None

    @property
    def step(self) -> int:
        """The number of steps trained."""
        return int(self.folder.name)

    @functools.cached_property
    def meta(self) -> dict[str, Any]:
        """What the checkpoint says of itself beside its arrays: see `identity.describe_run`."""
        return upgrade_meta(read_meta(self.folder))

    @functools.cached_property
    def config(self) -> Config:
        """The experiment. Raises UserError where this version cannot read it."""
        try:
            return from_dict(self.meta["config"])
        except (KeyError, ValueError) as error:
            raise UserError(f"no experiment in {self.folder / META} ({error}); give it with --config") from error

    def config_for_inference(self) -> Config:
        """Returns the experiment on one device: its mesh was for training."""
        return dataclasses.replace(self.config, mesh=MeshConfig())

    @property
    def provenance(self) -> Provenance:
        """What the run was trained on."""
        return Provenance(
            encoders=self.meta.get("encoders", {}),
            frame_rules=tuple(self.meta.get("frame_rules") or ()),
            labels=self.config.prompt.labels,
            base=ModelIdentity(self.meta.get("base", ""), self.meta.get("base_origin", "")),
        )

    @property
    def adapter_name(self) -> str:
        """What newer PEFT versions put before an adapter's ".weight" in files; "" for nothing."""
        return self.meta["adapter_name"]

    def values(self) -> dict[str, np.ndarray]:
        """Reads adapters and projectors by parameter path, on the host. Raises UserError when they are damaged."""
        return self._read_fixed(lambda name: name not in self.meta["carried"]) | read_params(self.folder)

    def carried(self) -> dict[str, np.ndarray]:
        """Reads the tensors that the model does not have, under their own names."""
        return self._read_fixed(lambda name: name in self.meta["carried"])

    def trained_weights(self) -> TrainedWeights:
        """Reads all that `load_emotion_llama` and an export need."""
        lora = dataclasses.replace(self.config.lora, targets=tuple(sorted(self.config.lora.targets)))
        return TrainedWeights.from_values(
            self.path,
            self.values(),
            self.carried(),
            lora=lora,
            adapter_name=self.adapter_name,
            base=self.config.weights.base,
            base_identity=self.provenance.base,
        )

    def check_resume(self, now: Mapping[str, Any]) -> None:
        """Raises UserError when the run would resume as another; `now` is of `describe_run`."""
        check_same(self.meta, now, self.path)

    def check_encoders(
        self,
        found: Mapping[str, str],
        *,
        all_known: bool = False,
        otherwise: str = ANY_ENCODERS,
    ) -> None:
        """Checks that features are of the encoders that the run learnt from, as far as it knows them.

        Args:
            found: the fingerprints of the encoders that are used now.
            all_known: whether a feature that is not in `found` is missing, rather than of an unknown encoder.
            otherwise: what else the user can do.

        Raises:
            UserError: they are not.
        """
        known = self.meta.get("encoders", {})
        missing = dict.fromkeys(FEATURES, "no encoder") if all_known else {}
        for name, now in (missing | dict(found)).items():
            before = known.get(name, now)
            if before != now and is_file_fingerprint(before) == is_file_fingerprint(now):
                self._refuse_encoder(name, before, now, otherwise)

    def check_labels(self, labels: Collection[str]) -> None:
        """Checks that these are the labels that the run was trained on, in any order. Raises UserError."""
        known = self.provenance.labels
        if set(labels) != set(known):
            raise UserError(
                f"{self.path} was trained on the labels {', '.join(known)}, not {', '.join(labels)}; ask for those, or "
                "for these all the same with --any-labels"
            )

    def check_image_encoder(self, files: Mapping[str, epath.PathLike | None]) -> None:
        """Checks the files `eva_vit` and `ln_vision`, where the run encoded frames itself. Raises UserError."""
        known = self.meta.get("encoders", {})
        if not is_file_fingerprint(known.get("eva_vit", "")):
            return
        for name, file in files.items():
            before, now = known.get(name, "no file"), file_fingerprint(file) if file else "no file"
            if before != now:
                self._refuse_encoder(name, before, now)

    def check_image_tokens(self, eva_vit: EvaVit) -> None:
        """Checks the parameters of the encoder of frames, where the run learnt from image tokens. Raises UserError."""
        known = self.meta.get("encoders", {}).get("eva_vit")
        if known and not is_file_fingerprint(known):
            self.check_encoders({"eva_vit": fingerprint_of(param_values(nnx.state(eva_vit)))})

    def _refuse_encoder(self, name: str, before: str, now: str, otherwise: str = ANY_ENCODERS) -> NoReturn:
        raise UserError(
            f"{self.path} was trained on {name} features of {before}, and here they are of {now}; give that "
            f"encoder ({name}), extract the data again with it, or {otherwise}"
        )

    def _read_fixed(self, wanted: Callable[[str], bool]) -> dict[str, np.ndarray]:
        return read_fixed(self.folder.parent.parent, self.meta.get("fixed"), wanted)


def _find_damage(folder: epath.Path) -> str | None:
    read = (STATE if has_old_layout(folder) else PARAMS, META)
    return find_damage(folder, lambda name: name in read)

"""The encoders: MAE, VideoMAE, HuBERT and EVA-ViT, new or from files by what their loaders share."""

import contextlib
from collections.abc import Callable
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from emollama_jax.io.paths import PathLike
from emollama_jax.models.eva_vit import EvaVit
from emollama_jax.models.hubert import Hubert
from emollama_jax.models.mae import Mae
from emollama_jax.models.videomae import VideoMae
from emollama_jax.models.vit import EncoderConfig
from emollama_jax.sharding import AxisRules, init_sharded
from emollama_jax.weights.engine import LoadReport, Table, first_device, load
from emollama_jax.weights.sources import open_source
from emollama_jax.weights.tensors import WeightSource

ENCODERS = {"eva_vit": EvaVit, "mae": Mae, "videomae": VideoMae, "hubert": Hubert}  # by the group of the experiment


def random_encoder(name: str, config: EncoderConfig, seed: int, *, mesh: Mesh | None = None) -> Any:
    """One of `ENCODERS` with new parameters, whole on every device of the mesh (default: on the first device)."""
    mesh = mesh or first_device()
    config = config.for_devices(mesh.devices.flat)
    return init_sharded(lambda: ENCODERS[name](config, rngs=nnx.Rngs(seed)), mesh, ())


def load_encoder(
    encoder: Callable[..., nnx.Module],
    where: PathLike | WeightSource,
    arrange: Callable[[WeightSource], tuple[EncoderConfig, WeightSource, Table]],
    *,
    mesh: Mesh | None,
    rules: AxisRules,
) -> tuple[nnx.Module, LoadReport]:
    """An encoder with its parameters, and its attention kernel chosen for the devices.

    Args:
        encoder: the module's class.
        where: its files, or weights that are open already.
        arrange: from the opened weights to the settings, the tensors as the table names them, and the table.
        mesh: where the parameters go, after `rules`; None is the first device.

    Raises:
        UserError: no model there, damaged files, another architecture, or tensors that do not fit it.
    """
    mesh, rules = (mesh, rules) if mesh else (first_device(), ())
    with contextlib.nullcontext(where) if isinstance(where, WeightSource) else open_source(where) as opened:
        config, source, table = arrange(opened)
        config = config.for_devices(mesh.devices.flat)
        return load(lambda: encoder(config, rngs=nnx.Rngs(0)), source, table, mesh=mesh, rules=rules)

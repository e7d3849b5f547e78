"""Tiny encoders of torch, their weights as sources in memory, and what a loaded encoder must hold.

Nothing here uses the code under test to name, order or lay out a tensor.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from emollama_jax.weights.engine import LoadReport
from emollama_jax.weights.tensors import StoredTensor, WeightSource
from tests.weights.tiny import Weights, stored_values

# Under Hugging Face's names and under ours.
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}
OUR_SIZES = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 80}
IMAGE = {"image_size": 32, "patch_size": 8}


class MemorySource(WeightSource):
    """Tensors in memory; `reads` are the names of those whose data was asked for, under whatever name."""

    def __init__(self, weights: Weights, config: dict[str, Any] | None = None):
        self.reads: list[str] = []

        def stored(name: str) -> StoredTensor:
            def read() -> np.ndarray:
                self.reads.append(name)
                return weights[name]

            return StoredTensor(weights[name].shape, read)

        super().__init__(Path("in-memory.pth"), "torch", {name: stored(name) for name in weights}, config)


def torch_encoder(kind: str, **settings: Any):
    """A new model of the transformers class `kind` in which every number is random, norms and biases too."""
    torch = pytest.importorskip("torch")
    model_class = getattr(pytest.importorskip("transformers"), kind)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def weights_of(model) -> dict[str, np.ndarray]:
    """The `state_dict` of a torch model."""
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def source_of(model, **settings: Any) -> MemorySource:
    """A torch model as its folder would be read; `settings` change its `config.json`."""
    return MemorySource(weights_of(model), model.config.to_dict() | settings)


def eagerly(load: Callable[..., tuple[nnx.Module, LoadReport]], *args: Any, **kwargs: Any):
    """What `load` returns, without compiling anything, which would take seconds."""
    with jax.disable_jit():
        return load(*args, **kwargs)


def assert_filled(model: nnx.Module, report: LoadReport, weights: Weights, names: Mapping[str, str]) -> None:
    """The float32 model holds these weights bit by bit, and the report says that those were read.

    Args:
        names: for each module (or parameter, where its tensor is not called weight or bias) its name in the file, with
            "{layer}" for the number of a layer.
    """
    read = set()
    for path, value in stored_values(model).items():
        parent, _, leaf = path.rpartition(".")
        name = names.get(path) or f"{names[parent]}.{'bias' if leaf == 'bias' else 'weight'}"
        layers = range(value.shape[0]) if "{layer}" in name else [0]
        tensors = [weights[name.format(layer=i)] for i in layers]
        if path.endswith("patches.proj.kernel"):
            tensors = [np.moveaxis(tensor, (1, 0), (-2, -1)) for tensor in tensors]
        elif leaf == "kernel":
            tensors = [tensor.T for tensor in tensors]
        np.testing.assert_array_equal(np.asarray(value), np.stack(tensors).reshape(value.shape), err_msg=path)
        read |= {name.format(layer=i) for i in layers}
    assert read == set(report.read)
    assert report.initialised == ()


def split_projections(weights: Weights) -> dict[str, np.ndarray]:
    """The weights with thirds of each fused projection beside it, named as in reports: `*.qkv.weight[q]`, ..."""
    thirds = {
        f"{name}[{part}]": third
        for name, value in weights.items()
        if ".qkv." in name
        for part, third in zip("qkv", np.split(value, 3), strict=True)
    }
    return dict(weights) | thirds


def torch_bicubic(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """What torch interpolates from a grid [H, W, D]."""
    torch = pytest.importorskip("torch")
    image = torch.tensor(grid).permute(2, 0, 1)[None]
    image = torch.nn.functional.interpolate(image, size=(height, width), mode="bicubic", align_corners=False)
    return image[0].permute(1, 2, 0).numpy()

"""What the tables of the vision encoders share: positions for another grid, fused projections, prefixes, patches."""

import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emollama_jax.models.vit import PatchEmbed, VitConfig
from emollama_jax.weights.tensors import StoredTensor, WeightSource
from emollama_jax.weights.vit import interpolate_positions, patch_rules, resize_positions, split_qkv, without_prefix
from tests.weights.encoders import MemorySource, torch_bicubic
from tests.weights.tiny import FLOAT32


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


# --- sources with other tensors ---


def test_with_tensors_changes_the_tensors_only():
    old, new = random(2, 3), random(4)
    source = WeightSource(Path("a.pth"), "torch", {"old": StoredTensor((2, 3), lambda: old)}, {"a": 1}, {"epoch": 3})
    other = source.with_tensors({"kept": source.stored("old"), "new": StoredTensor((4,), lambda: new)})
    assert (other.path, other.format, other.config, other.extra) == (Path("a.pth"), "torch", {"a": 1}, {"epoch": 3})
    assert other.names() == ["kept", "new"]
    assert other.stored("kept") is source.stored("old")
    assert (other.shape("kept"), other.shape("new")) == ((2, 3), (4,))
    assert other.read("kept") is old
    assert other.read("new") is new
    assert source.names() == ["old"]
    with pytest.raises(KeyError):
        other.stored("old")


def test_without_prefix():
    """It goes where it stands at the beginning, unless the shorter name is taken."""
    names = ["vit.a", "vit.b.vit.c", "d", "head.vit.e", "vit.d", "vit.vit.f"]
    source = MemorySource({name: random(i + 1) for i, name in enumerate(names)})
    shorter = {"a": 1, "b.vit.c": 2, "d": 3, "head.vit.e": 4, "vit.d": 5, "vit.f": 6}
    stripped = without_prefix(source, "vit.")
    assert {name: stripped.shape(name)[0] for name in stripped.names()} == shorter
    assert source.reads == []
    np.testing.assert_array_equal(stripped.read("b.vit.c"), random(2))


@pytest.mark.smoke
def test_split_qkv():
    """Queries, keys and values in this order, each as long as a third; nothing else is touched, nothing read."""
    weights = {
        "0.qkv.weight": random(12, 5),
        "0.qkv.bias": random(6),
        "1.qkv.weight": random(9, 2, 1),
        "0.qkv.scale": random(6),
        "xqkv.weight": random(6, 2),
        "2.qkv.weight": random(7, 3),  # no three of anything: the engine's to refuse
        "3.qkv.bias": random(),  # a damaged file's
    }
    source = MemorySource(weights)
    split = split_qkv(source)
    parts = [f"{name}[{part}]" for name in ("0.qkv.bias", "0.qkv.weight", "1.qkv.weight") for part in "kqv"]
    assert split.names() == sorted([*parts, "0.qkv.scale", "xqkv.weight", "2.qkv.weight", "3.qkv.bias"])
    assert [split.shape(f"0.qkv.weight[{part}]") for part in "qkv"] == [(4, 5)] * 3
    assert split.shape("1.qkv.weight[v]") == (3, 2, 1)
    assert source.reads == []
    for name in ("0.qkv.weight", "0.qkv.bias", "1.qkv.weight"):
        for i, part in enumerate("qkv"):
            rows = len(weights[name]) // 3
            np.testing.assert_array_equal(split.read(f"{name}[{part}]"), weights[name][i * rows : (i + 1) * rows])
    for name in ("0.qkv.scale", "xqkv.weight", "2.qkv.weight"):
        assert split.stored(name) is source.stored(name)


# --- positions ---


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((16, 16), (32, 32)),
        ((14, 14), (20, 20)),
        ((32, 32), (16, 16)),
        ((24, 24), (7, 7)),
        ((9, 7), (4, 5)),
        ((5, 8), (11, 3)),
        ((3, 3), (50, 1)),
        ((1, 1), (4, 4)),
        ((2, 1), (5, 2)),
    ],
    ids=str,
)
def test_interpolation_is_torchs(old, new):
    positions = random(*old, 6)
    ours, theirs = interpolate_positions(positions, *new), torch_bicubic(positions, *new)
    assert ours.dtype == np.float32
    assert ours.shape == theirs.shape == (*new, 6)
    assert np.max(np.abs(ours - theirs)) <= 1e-5


def test_interpolation_to_the_same_grid_changes_nothing():
    positions = random(7, 5, 3)
    np.testing.assert_array_equal(interpolate_positions(positions, 7, 5), positions)


@pytest.mark.parametrize("grid", [3, 9])
def test_resized_positions(grid):
    """The patches' are interpolated as the square they are, the class token's is the file's to the bit."""
    positions = random(1, 26, 6)
    source = MemorySource({"pos": positions, "other": random(1, 26, 6)})
    resized = resize_positions(source, "pos", grid)
    assert resized.shape("pos") == (1, 1 + grid**2, 6)
    assert source.reads == []
    assert resized.stored("other") is source.stored("other")
    read = resized.read("pos")
    np.testing.assert_array_equal(read[:, 0], positions[:, 0])
    expected = torch_bicubic(positions[0, 1:].reshape(5, 5, 6), grid, grid)
    assert np.max(np.abs(read[0, 1:].reshape(grid, grid, 6) - expected)) <= 1e-5


def test_positions_of_half_precision_are_interpolated_in_float32():
    half = random(1, 26, 6).astype(np.float16)
    resize = lambda positions: resize_positions(MemorySource({"pos": positions}), "pos", 8).read("pos")
    assert resize(half).dtype == np.float32
    np.testing.assert_array_equal(resize(half), resize(half.astype(np.float32)))


@pytest.mark.parametrize(
    "shape",
    [(1, 26, 6), (1, 25, 6), (1, 24, 6), (1, 1, 6), (26, 6), (1, 26, 6, 1), (0,), ()],
    ids=str,
)
def test_positions_of_the_same_grid_or_of_none_stay(shape):
    source = MemorySource({"pos": random(*shape)})
    assert resize_positions(source, "pos", 5).stored("pos") is source.stored("pos")
    assert resize_positions(source, "absent", 5).names() == ["pos"]


# --- patches ---


@pytest.mark.parametrize("window", [(4, 4), (2, 4, 4)], ids=str)
def test_patches_are_torchs_convolution(window):
    torch = pytest.importorskip("torch")
    kernel, bias = random(8, 3, *window) / math.prod(window) ** 0.5, random(8)
    pixels = random(2, 3, *(3 * size if i else 2 * size for i, size in enumerate(window)))  # as torch has them
    weight, offset = patch_rules("conv", "patches", *window)
    assert (weight.tensor, weight.param) == ("conv.weight", "patches.proj.kernel")
    assert (offset.tensor, offset.param) == ("conv.bias", "patches.proj.bias")

    frames = window[0] if len(window) == 3 else 1
    patches = PatchEmbed(
        VitConfig(hidden_size=8, num_heads=1, patch_size=4, **FLOAT32), frames=frames, rngs=nnx.Rngs(0)
    )
    assert weight.transform.into(kernel).shape == patches.proj.kernel.shape
    patches.proj.kernel[...], patches.proj.bias[...] = weight.transform.into(kernel), offset.transform.into(bias)
    clip = np.moveaxis(pixels, 1, -1) if len(window) == 3 else np.moveaxis(pixels, 1, -1)[:, None]
    ours = np.asarray(patches(jnp.asarray(clip)))

    convolve = torch.nn.functional.conv3d if len(window) == 3 else torch.nn.functional.conv2d
    theirs = convolve(*map(torch.tensor, (pixels, kernel, bias)), stride=window).flatten(2).transpose(1, 2).numpy()
    assert ours.shape == theirs.shape
    assert np.std(theirs) > 1
    assert np.max(np.abs(ours - theirs)) <= 1e-5


@pytest.mark.parametrize("window", [(4, 4), (2, 5, 3)], ids=str)
def test_patch_layouts_are_inverse(window):
    kernel = random(8, 3, *window)
    layout = patch_rules("conv", "patches", *window)[0].transform
    ours = layout.into(kernel)
    assert ours.shape == (3 * np.prod(window), 8)
    np.testing.assert_array_equal(layout.out(ours), kernel)
    # Channels last, the columns of a patch before them.
    np.testing.assert_array_equal(ours[:3, 5], kernel[(5, slice(None), *(0 for _ in window))])
    np.testing.assert_array_equal(ours[3:6, 5], kernel[(5, slice(None), *(0 for _ in window[:-1]), 1)])

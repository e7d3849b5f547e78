"""What the tables of the vision encoders share: layouts, fused projections, and positions for another grid."""

import math
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float

from emollama_jax.weights.engine import SAME, TRANSPOSE, Rule, Transform
from emollama_jax.weights.tensors import StoredTensor, WeightSource

LEADING_ONE = Transform(lambda x: x[0], lambda x: x[None])
CLS_TOKEN = Transform(lambda x: x[0, 0], lambda x: x[None, None])
BICUBIC_A = -0.75  # torch's cubic convolution; the usual one has -0.5
PARTS = "qkv"


def linear_rules(pairs: Iterable[tuple[str, str]]) -> list[Rule]:
    """Rules for linear layers with biases, from (their name in the file, ours)."""
    return [
        rule
        for theirs, ours in pairs
        for rule in (
            Rule(f"{theirs}.weight", f"{ours}.kernel", TRANSPOSE),
            Rule(f"{theirs}.bias", f"{ours}.bias"),
        )
    ]


def norm_rules(pairs: Iterable[tuple[str, str]]) -> list[Rule]:
    """Rules for layer norms, from (their name in the file, ours)."""
    return [
        rule
        for theirs, ours in pairs
        for rule in (Rule(f"{theirs}.weight", f"{ours}.scale", SAME), Rule(f"{theirs}.bias", f"{ours}.bias", SAME))
    ]


def patch_rules(theirs: str, ours: str, *window: int) -> list[Rule]:
    """Rules for a convolution of patches that do not overlap: its kernel [D, 3, *window] is our [window 3, D]."""
    n = len(window)
    layout = Transform(
        into=lambda x: x.transpose(*range(2, n + 2), 1, 0).reshape(-1, x.shape[0]),
        out=lambda x: x.reshape(*window, 3, -1).transpose(n + 1, n, *range(n)),
    )
    return [Rule(f"{theirs}.weight", f"{ours}.proj.kernel", layout), Rule(f"{theirs}.bias", f"{ours}.proj.bias")]


def timm_rules(block: str, patch_size: int) -> list[Rule]:
    """What the original files of EVA and MAE have in common: the names of timm's `VisionTransformer`, the fused
    projections taken apart by `split_qkv`."""
    return [
        Rule("cls_token", "embed.cls_token", CLS_TOKEN),
        Rule("pos_embed", "embed.positions", LEADING_ONE),
        *patch_rules("patch_embed.proj", "embed.patches", patch_size, patch_size),
        *norm_rules([(f"{block}.norm1", "layers.attn_norm"), (f"{block}.norm2", "layers.mlp_norm")]),
        *(Rule(f"{block}.attn.qkv.weight[{p}]", f"layers.attn.{p}_proj.kernel", TRANSPOSE) for p in PARTS),
        *linear_rules(
            [
                (f"{block}.attn.proj", "layers.attn.o_proj"),
                (f"{block}.mlp.fc1", "layers.mlp.up_proj"),
                (f"{block}.mlp.fc2", "layers.mlp.down_proj"),
            ]
        ),
    ]


def without_prefix(source: WeightSource, prefix: str) -> WeightSource:
    """The source with a prefix, which files of models around the encoder have, taken off where it stands."""
    names = source.names()
    shorter = {name: name.removeprefix(prefix) for name in names}
    return source.with_tensors(
        {name if shorter[name] in names else shorter[name]: source.stored(name) for name in names}
    )


def split_qkv(source: WeightSource) -> WeightSource:
    """The source with each `*.qkv.weight` [3D, ...] and `*.qkv.bias` [3D] as three: `*.qkv.weight[q]`, ..."""
    tensors = {}
    for name in source.names():
        stored = source.stored(name)
        if not name.endswith((".qkv.weight", ".qkv.bias")) or not stored.shape or stored.shape[0] % 3:
            tensors[name] = stored
            continue
        rows = stored.shape[0] // 3
        for i, part in enumerate(PARTS):
            read = lambda stored=stored, i=i, rows=rows: stored.read()[i * rows : (i + 1) * rows]
            tensors[f"{name}[{part}]"] = StoredTensor((rows, *stored.shape[1:]), read)
    return source.with_tensors(tensors)


def resize_positions(source: WeightSource, name: str, grid: int) -> WeightSource:
    """The source with the position embeddings `name` [1, 1 + g^2, D] of another grid interpolated to `grid` x `grid`.

    The first, the class token's, is kept. Bicubic, as `interpolate_positions`.
    """
    if name not in source.names():
        return source
    stored = source.stored(name)
    shape = stored.shape
    side = math.isqrt(shape[1] - 1) if len(shape) == 3 and shape[1] > 1 else 0
    if side in (0, grid) or side**2 + 1 != shape[1]:
        return source  # nothing to do; what is no square grid is the engine's to refuse

    def read() -> np.ndarray:
        positions = stored.read().astype(np.float32)
        patches = interpolate_positions(positions[0, 1:].reshape(side, side, -1), grid, grid)
        return np.concatenate([positions[:, :1], patches.reshape(1, grid**2, -1)], axis=1)

    resized = StoredTensor((1, 1 + grid**2, shape[2]), read)
    return source.with_tensors({n: resized if n == name else source.stored(n) for n in source.names()})


def interpolate_positions(
    positions: Float[np.ndarray, "H W D"], height: int, width: int
) -> Float[np.ndarray, "height width D"]:
    """Position embeddings on a grid of another size, float32.

    What torch's `interpolate(mode="bicubic", align_corners=False)` gives: cubic convolution with a = -0.75 between the
    centres of the cells, the border repeated, without antialiasing where the grid shrinks.
    """
    rows, columns = _bicubic(positions.shape[0], height), _bicubic(positions.shape[1], width)
    return np.einsum("ih,jw,hwd->ijd", rows, columns, positions, optimize=True).astype(np.float32)


def _bicubic(size: int, new_size: int) -> Float[np.ndarray, "new old"]:
    """The weights of the old cells in each new one."""
    weights = np.zeros((new_size, size))
    centres = np.float32(size / new_size) * (np.arange(new_size, dtype=np.float32) + 0.5) - 0.5  # float32, as torch
    first = np.floor(centres).astype(int)
    for offset in (-1, 0, 1, 2):
        cells = first + offset
        np.add.at(weights, (np.arange(new_size), cells.clip(0, size - 1)), _cubic(np.abs(centres - cells)))
    return weights


def _cubic(distance: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """The kernel of cubic convolution (Keys 1981, doi:10.1109/TASSP.1981.1163711) for distances up to 2."""
    a, x = BICUBIC_A, distance
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, far)

"""Low-rank adapters (LoRA, arXiv:2106.09685) on frozen linear layers: y = x W + (α/r) dropout(x) A B.

A is [in, r] and B is [r, out], the transposes of PEFT's `lora_A.weight` and `lora_B.weight`; both are float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Key

from emollama_jax.fields import check_fields, field
from emollama_jax.models.layers import QUANTISED, Linear, as_array, computed_once, matmul, param, stacked, stacked_axes

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DROPOUT = "dropout"  # by which a policy of recomputation knows what `kept` returns


@dataclass(frozen=True, slots=True)
class LoRAConfig:
    """The adapters; the defaults are those of the released Emotion-LLaMA."""

    rank: int = field(64, ge=0)
    """Width r of the adapters; 0 gives a model without adapters."""
    alpha: float = 16.0
    """Scale numerator α: an adapter's output is multiplied by α / r."""
    dropout: float = field(0.05, ge=0, lt=1)
    """Probability with which an element of the adapter's input is dropped in training."""
    targets: tuple[str, ...] = field(("q_proj", "v_proj"), choices=PROJECTIONS)
    """Which linear layers of a block get an adapter: any of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and
    down_proj."""

    def __post_init__(self):
        check_fields(self)


class LoRALinear(Linear):
    """A linear layer with an adapter beside its kernel."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: tuple[str | None, str | None],
        lora: LoRAConfig,
        num_layers: int | None = None,
        rngs: nnx.Rngs,
        **kwargs,
    ):
        super().__init__(in_features, out_features, axes=axes, num_layers=num_layers, rngs=rngs, **kwargs)
        self.scale = lora.alpha / lora.rank
        self.dropout = lora.dropout
        self.merged = False

        def init_a(key):  # Kaiming-uniform with a = sqrt(5), as PEFT's
            bound = in_features**-0.5
            return jax.random.uniform(key, (in_features, lora.rank), jnp.float32, -bound, bound)

        a = stacked(init_a, rngs.params(), num_layers)
        shape = (lora.rank, out_features) if num_layers is None else (num_layers, lora.rank, out_features)
        b = jnp.zeros(shape, jnp.float32)
        self.lora_a = param(a, stacked_axes((axes[0], "lora_rank"), num_layers), nnx.LoRAParam)
        self.lora_b = param(b, stacked_axes(("lora_rank", axes[1]), num_layers), nnx.LoRAParam)

    def __call__(
        self, x: Float[Array, "*B in"], dropout_key: Key[Array, ""] | None = None, half: int = 0
    ) -> Float[Array, "*B out"]:
        """Adapters called with one `dropout_key` and different `half`s, 0 and 1, drop on their own."""
        y = super().__call__(x)
        if self.merged:
            return y
        if dropout_key is not None and self.dropout > 0:
            keep = kept(dropout_key, self.dropout, x.shape, half)
            x = jnp.where(keep, x / (1 - self.dropout), 0).astype(x.dtype)
        return y + self.scale * matmul(matmul(x, self.lora_a[...]), self.lora_b[...])

    def delta(self) -> Float[Array, "*L in out"]:
        """What merging adds to the kernel, float32."""
        return self.scale * jnp.matmul(self.lora_a[...], self.lora_b[...], precision="highest")


def kept(key: Key[Array, ""], rate: float, shape: tuple[int, ...], half: int) -> Bool[Array, "*B in"]:
    """Which elements dropout keeps: all but a share `rate` to the nearest 65536th, as 16 random bits decide each.

    Args:
        half: 0 or 1: which half of the words' bits these are. To draw words takes a TPU longer than an adapter's
            products, and two adapters with one key and different halves share them.
    """
    words = computed_once(jax.random.bits(key, shape, jnp.uint32))
    bits = words >> 16 if half else words & 0xFFFF
    return checkpoint_name(bits >= round(rate * 2**16), DROPOUT)


def is_adapter(path: tuple, variable: nnx.Variable) -> bool:
    """Whether a parameter is an adapter's: an NNX filter for `nnx.split` and `nnx.state`."""
    del path
    return issubclass(getattr(variable, "type", type(variable)), nnx.LoRAParam)


def adapters(model: nnx.Module) -> Iterator[tuple[tuple, LoRALinear]]:
    """Every adapted layer with its path."""
    return ((path, m) for path, m in nnx.iter_graph(model) if isinstance(m, LoRALinear))


def adapter_targets(model: nnx.Module) -> tuple[str, ...]:
    """The names of the adapted layers, as in `LoRAConfig.targets`, sorted."""
    return tuple(sorted({path[-1] for path, _ in adapters(model)}))


def merged_kernel(layer: Linear) -> Float[Array, "*L in out"]:
    """The kernel with its adapter added, float32, also from a quantised kernel and from a layer without adapter."""
    kernel = as_array(layer.kernel.get_value()).astype(jnp.float32)
    return kernel + layer.delta() if isinstance(layer, LoRALinear) and not layer.merged else kernel


def merge(model: nnx.Module) -> None:
    """Adds the adapters to the kernels, in place: the same outputs without the adapters' cost.

    Raises:
        ValueError: a kernel is quantised; adding to it would round the adapter away.
    """
    layers = [layer for _, layer in adapters(model) if not layer.merged]
    for layer in layers:
        if not isinstance(layer.kernel.get_value(), jax.Array):
            raise ValueError(f"adapters cannot be merged into {'/'.join(QUANTISED)} kernels; load them in bfloat16")
    for layer in layers:
        kernel = layer.kernel[...]
        layer.kernel[...] = (kernel.astype(jnp.float32) + layer.delta()).astype(kernel.dtype)
        layer.merged = True

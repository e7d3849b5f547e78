"""TPU slices by the names that `emollama plan` takes: v5e-16, v6e-16, v5p-16."""

import math
from dataclasses import dataclass

CHIPS_A_VM = 4


class TypeNameError(ValueError):
    """There is no such slice; the message lists those there are."""


@dataclass(frozen=True)
class Kind:
    """A generation of TPUs, by the names that Cloud TPU's and GKE's interfaces have for it.

    Attributes:
        accelerator: what stands before the number in Cloud TPU's accelerator type.
        runtime: the software version of its virtual machines.
        gke_accelerator: the label of GKE's nodes.
        machine: GKE's machine type with four chips.
        cores: how many of the numbers in a slice's name a chip counts for.
        shapes: the arrangements of chips.
    """

    accelerator: str
    runtime: str
    gke_accelerator: str
    machine: str
    cores: int
    shapes: tuple[tuple[int, ...], ...]


_FLAT = ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CUBES = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8))

KINDS = {
    "v5e": Kind("v5litepod", "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", "ct5lp-hightpu-4t", 1, _FLAT),
    "v6e": Kind("v6e", "v2-alpha-tpuv6e", "tpu-v6e-slice", "ct6e-standard-4t", 1, _FLAT),
    "v5p": Kind("v5p", "v2-alpha-tpuv5", "tpu-v5p-slice", "ct5p-hightpu-4t", 2, _CUBES),
}


@dataclass(frozen=True)
class Slice:
    """One slice, such as v5e-16."""

    name: str
    kind: Kind
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def vms(self) -> int:
        """GKE's virtual machines of four chips."""
        return self.chips // CHIPS_A_VM

    @property
    def accelerator_type(self) -> str:
        return f"{self.kind.accelerator}-{self.chips * self.kind.cores}"

    @property
    def topology(self) -> str:
        return "x".join(map(str, self.shape))


def parse_type(name: str) -> Slice:
    """Returns the slice of a name. Raises TypeNameError where there is none."""
    generation, _, number = name.partition("-")
    kind = KINDS.get(generation)
    if kind is None or not number.isdecimal():
        raise TypeNameError(f"{name}: no such slice; write KIND-NUMBER with a KIND of {', '.join(KINDS)}, as in v5e-16")
    sizes = {kind.cores * math.prod(shape): shape for shape in kind.shapes}
    if int(number) not in sizes:
        cores = f" (cores, {kind.cores} a chip)" if kind.cores > 1 else ""
        raise TypeNameError(f"{name}: {generation} comes in {', '.join(map(str, sizes))}{cores}")
    return Slice(name, kind, sizes[int(number)])

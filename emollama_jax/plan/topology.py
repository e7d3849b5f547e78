"""Topologies by the clouds' names, the compiler's names for them, and the makers' specifications of their chips."""

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from emollama_jax.errors import UserError, first_line
from emollama_jax.train.speed import device_peak_flops

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Chip:
    """The specification of a chip that a plan assumes. Bandwidths are of one chip, in bytes a second."""

    kind: str
    """JAX's `device_kind`; peak speed and memory bandwidth are those of `train/speed.py`."""
    memory: float
    """Bytes available to a program."""
    clock: float
    """Cycles a second of a TPU's cores, for the compiler's counts of cycles; 0 where it counts none."""
    link: float
    """Bandwidth within the slice or node: both directions of one axis of the torus, or through the switch."""
    network: float
    """Bandwidth to other slices or nodes: the chip's share of the host's."""
    shapes: tuple[tuple[int, ...], ...]
    """The arrangements of chips that the compiler knows, or the numbers of devices in a node."""
    cores: int = 1
    """Cores a chip, where the cloud's name of a slice counts cores."""
    target: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    """A GPU's description for the compiler (GpuTargetConfig)."""

    @property
    def flops(self) -> float:
        return device_peak_flops(self.kind).flops

    @property
    def bandwidth(self) -> float:
        return device_peak_flops(self.kind).bytes_per_s


_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CUBES = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8))
_GPU = {  # of every CUDA device
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 49152,
    "block_dim_limit_x": 2147483647,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
}
_H100 = {
    "shared_memory_per_core": 233472,
    "shared_memory_per_block_optin": 232448,
    "threads_per_core_limit": 2048,
    "core_count": 132,
    "fpus_per_core": 128,
    "memory_bandwidth": 3352320000000,
    "l2_cache_size": 52428800,
    "clock_rate_ghz": 1.98,
    "device_memory_size": 84978434048,
    "cuda_compute_capability": (9, 0),
}
_H200 = _H100 | {"memory_bandwidth": 4800000000000, "device_memory_size": 141000000000}
_T4 = {
    "shared_memory_per_core": 65536,
    "shared_memory_per_block_optin": 65536,
    "threads_per_core_limit": 1024,
    "core_count": 40,
    "fpus_per_core": 64,
    "memory_bandwidth": 320064000000,
    "l2_cache_size": 4194304,
    "clock_rate_ghz": 1.59,
    "device_memory_size": 15642329088,
    "cuda_compute_capability": (7, 5),
}

# Memory, links and shares of the network are what Google's pages on each TPU and NVIDIA's data sheets state; a TPU's
# program gets what its compiler leaves it, a GPU's nine tenths. The clocks are those that bring the compiler's cycles
# of a large matrix product to the stated speed.
CHIPS = {
    "v4": Chip("TPU v4", 31.75 * GIB, 1.05e9, 90e9, 6.25e9, _CUBES, 2),
    "v5e": Chip("TPU v5e", 15.75 * GIB, 1.5e9, 90e9, 3.125e9, _FLAT),
    "v5p": Chip("TPU v5", 95.74 * GIB, 1.75e9, 180e9, 6.25e9, _CUBES, 2),
    "v6e": Chip("TPU v6e", 31.25 * GIB, 1.75e9, 180e9, 12.5e9, _FLAT),
    "h100": Chip(
        "NVIDIA H100",
        0.9 * _H100["device_memory_size"],
        0.0,
        450e9,
        50e9,
        ((1,), (2,), (4,), (8,)),
        target=_GPU | _H100,
    ),
    "h200": Chip(
        "NVIDIA H200",
        0.9 * _H200["device_memory_size"],
        0.0,
        450e9,
        50e9,
        ((1,), (2,), (4,), (8,)),
        target=_GPU | _H200,
    ),
    "t4": Chip("Tesla T4", 0.9 * _T4["device_memory_size"], 0.0, 16e9, 3e9, ((1,), (2,), (4,)), target=_GPU | _T4),
}
ALIASES = {"v5litepod": "v5e"}


@dataclass(frozen=True, slots=True)
class Topology:
    """Chips of one kind in one or several slices (nodes, of GPUs)."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def platform(self) -> str:
        return "cuda" if self.chip.target else "tpu"

    @property
    def size(self) -> int:
        """Devices in all."""
        return self.slices * math.prod(self.shape)

    def devices(self) -> list[jax.Device]:
        """Descriptions of the devices to compile for; the hardware is not needed.

        Raises:
            UserError: the compiler for them is not installed.
        """
        if self.platform == "tpu":
            name, options = f"{self.name.rpartition('x')[2].partition('-')[0]}", {}
            name = f"{ALIASES.get(name, name)}:{'x'.join(map(str, self.shape))}"
            if name.startswith("v4"):
                options["chip_config_name"] = "megacore"
            if math.prod(self.shape) == 1:
                options["chips_per_host_bounds"] = (1, 1, 1)
            if self.slices > 1:
                options["num_slices"] = self.slices
            extra = "plan"
        else:
            name, extra = "", "cuda"
            options = {"target_config": _target(self.chip), "topology": f"{self.slices}x1x{math.prod(self.shape)}"}
        try:
            return topologies.get_topology_desc(platform=self.platform, topology_name=name, **options).devices
        except (ImportError, NotImplementedError, ValueError, RuntimeError) as error:
            raise UserError(
                f"--topology {self.name}: there is no compiler for it ({first_line(error)}); "
                f"pip install 'emollama_jax[{extra}]'"
            ) from error


def parse_topology(name: str) -> Topology:
    """The topology of a cloud's name: v5e-16, v5litepod-16, v5p-16 (16 cores are 8 chips), h100-8; several slices have
    their number in front: 2xv5e-16.

    Raises:
        UserError: there is no such topology.
    """
    found = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*)-(\d+)", name)
    kind = found and ALIASES.get(found[2], found[2])
    if not found or kind not in CHIPS:
        raise UserError(
            f"--topology {name}: no such chips; write KIND-NUMBER, with a KIND of {', '.join(CHIPS)}, "
            "as in v5e-16, or 2xv5e-16 for two slices"
        )
    chip, slices = CHIPS[kind], int(found[1] or 1)
    sizes = {chip.cores * math.prod(shape): shape for shape in chip.shapes}
    if int(found[3]) not in sizes or not slices:
        raise UserError(
            f"--topology {name}: {kind} comes in {', '.join(map(str, sizes))}"
            + (f" (cores, {chip.cores} a chip)" if chip.cores > 1 else "")
        )
    return Topology(name, chip, sizes[int(found[3])], slices)


def _target(chip: Chip) -> str:
    """A GpuTargetConfig as a text proto."""
    major, minor = chip.target["cuda_compute_capability"]
    plain = {name: value for name, value in chip.target.items() if name != "cuda_compute_capability"}
    return "\n".join(
        [
            "gpu_device_info {",
            *(f"  {name}: {value}" for name, value in plain.items()),
            f"  cuda_compute_capability {{ major: {major} minor: {minor} }}",
            "}",
            'platform_name: "CUDA"',
            "dnn_version_info { major: 9 minor: 8 }",
            "runtime_version { major: 12 minor: 8 }",
            f'device_description_str: "{chip.kind}"',
        ]
    )

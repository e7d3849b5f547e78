"""`emollama params`: the numbers of the paper, from shapes alone."""

import re
from typing import NamedTuple

import jax
import pytest

from emollama_jax import cli

# Sizes that make every part a round number of MiB.
LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_layers": 8,
    "num_heads": 8,
    "num_kv_heads": 8,
    "head_dim": 128,
    "vocab_size": 4096,
    "param_dtype": "bfloat16",
}


class Row(NamedTuple):
    parameters: int
    share: float  # percent
    memory: float  # MiB
    on_a_device: float
    stored_as: str


def params(capsys, *arguments: str) -> dict[str, Row]:
    """The table by part."""
    return output(capsys, *arguments)[0]


def output(capsys, *arguments: str) -> tuple[dict[str, Row], list[str]]:
    """The table by part, and the lines below it."""
    assert cli.main(["params", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    table, below = captured.out.split("\n\n")
    heading, *lines = table.splitlines()
    assert heading.split() == ["part", "parameters", "share", "memory", "a", "device", "stored", "as"]
    assert len({line.index(" MiB  ") for line in lines}) == 1
    pattern = r"([\w-]+) +([\d,]+) +([\d.]+) % +([\d.,]+) MiB +([\d.,]+) MiB  (.+)"
    rows = [re.fullmatch(pattern, line) for line in lines]
    number = lambda text: float(text.replace(",", ""))
    table = {row[1]: Row(int(number(row[2])), *map(number, row.groups()[2:5]), row[6]) for row in rows}
    return table, below.splitlines()


def refused(capsys, *arguments: str) -> str:
    assert cli.main(["params", *arguments]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.startswith("emollama params: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("name", ["llama2_7b", "stage1_merr", "stage2_merr", "mer2023", "dfew"])
def test_the_papers_model(capsys, name):
    """Emotion-LLaMA trains "34M, 0.495 %" of LLaMA-2-7B, and its projectors; no byte of all these is allocated."""
    before = {id(array) for array in jax.live_arrays()}
    table, below = output(capsys, "--config", name, "--config.mesh.fsdp=1")
    assert {id(array) for array in jax.live_arrays()} <= before
    assert table["LoRA"].parameters == 33_554_432
    assert below[0] == "LoRA is 0.4955 % of LLaMA + LoRA, 6,771,970,048 parameters"
    assert table["projectors"].parameters == 41_439_232
    assert table["trainable"][:2] == (74_993_664, 0.9614)
    assert table["trainable"][2:] == (286.1, 286.1, "float32")
    llama = [table[part].parameters for part in ("embedding", "attention", "MLP", "norms", "head")]
    assert sum(llama) == 6_738_415_616
    assert table["EVA-ViT"].parameters == 986_978_688  # that of torch's Blip2VisionModel with 39 layers at 448 pixels
    assert table["frozen"].parameters == sum(llama) + table["EVA-ViT"].parameters
    assert table["all"].parameters == table["frozen"].parameters + table["trainable"].parameters
    assert table["head"] == table["embedding"] == (131_072_000, 1.6803, 250.0, 250.0, "bfloat16")
    parts = ["LoRA", "projectors", "EVA-ViT", "embedding", "attention", "MLP", "norms", "head"]
    assert list(table) == [*parts, "all", "frozen", "trainable"]


@pytest.mark.smoke
def test_tiny(capsys):
    """Counted by hand: 640 x 32 twice, 3 x 4 x 32 x 32, 3 x 3 x 32 x 88, 7 x 32, and 3 x 2 x (32 x 8 + 8 x 32); the
    projectors 4 x 48 x 32, 3 x 1024 x 32, 48 x 32 and 5 x 32."""
    table, below = output(capsys, "--config=tiny")
    assert {part: row.parameters for part, row in table.items() if part not in ("EVA-ViT", "all", "frozen")} == {
        "LoRA": 3072,
        "projectors": 106144,
        "embedding": 20480,
        "attention": 12288,
        "MLP": 25344,
        "norms": 224,
        "head": 20480,
        "trainable": 109216,
    }
    parts = {part: row for part, row in table.items() if part not in ("all", "frozen", "trainable")}
    assert sum(row.share for row in parts.values()) == pytest.approx(100, abs=1e-3)
    assert sum(row.parameters for row in parts.values()) == table["all"].parameters
    assert below == [
        "LoRA is 3.7515 % of LLaMA + LoRA, 81,888 parameters",
        "a device: of 1, data=1 x fsdp=1 x tensor=1",
    ]


def test_tied_and_grouped(capsys):
    table, below = output(capsys, "--config", "smollm2_135m")
    assert "head" not in table
    assert sum(table[part].parameters for part in ("embedding", "attention", "MLP", "norms")) == 134_515_008
    assert table["LoRA"].parameters == 3_686_400
    assert below[0].startswith("LoRA is 2.6674 %")


def test_without_adapters(capsys):
    table, below = output(capsys, "--config=tiny", "--config.lora.rank=0")
    assert "LoRA" not in table
    assert table["trainable"] == table["projectors"]
    assert below[0].startswith("LoRA is 0.0000 %")


def test_a_subset_is_trained(capsys):
    table = params(capsys, "--config=tiny", "--config.trainable=mae_proj,hubert_proj")
    assert table["trainable"].parameters == 2 * (1024 * 32 + 32)
    assert table["all"].parameters == table["trainable"].parameters + table["frozen"].parameters
    assert "no 'mae'; choose among lora, image_proj, mae_proj" in refused(
        capsys, "--config=tiny", "--config.trainable=mae,lora"
    )


def test_memory_on_each_device(capsys):
    """Over 16 devices: what has the axis "embed" is split, LoRA's B (of rank and heads) and the norms are not."""
    whole = params(capsys, "--config=stage1_merr", "--devices=1")
    split, below = output(capsys, "--config=stage1_merr", "--devices=16")
    assert below[1] == "a device: of 16, data=1 x fsdp=16 x tensor=1"
    for part in ("embedding", "attention", "MLP", "head"):
        assert split[part].on_a_device == pytest.approx(whole[part].memory / 16, abs=0.06)
    assert split["LoRA"].on_a_device == 64 + 64 / 16
    assert split["norms"].on_a_device == whole["norms"].memory
    assert split["all"].memory == whole["all"].memory == whole["all"].on_a_device
    both = params(capsys, "--config=stage1_merr", "--config.mesh.tensor=4", "--devices=16")
    assert both["attention"].on_a_device == pytest.approx(whole["attention"].memory / 16, abs=0.06)
    assert both["LoRA"].on_a_device == 64 / 4 + 64 / 4
    copies = params(capsys, "--config=stage1_merr", "--config.mesh.data=4", "--devices=16")
    assert copies["MLP"].on_a_device == pytest.approx(whole["MLP"].memory / 4, abs=0.06)


def test_a_mesh_that_does_not_fit(capsys):
    error = refused(capsys, "--config=stage1_merr", "--config.mesh.tensor=3", "--devices=16")
    assert "mesh data=1 x fsdp=-1 x tensor=3 does not fit 16 devices" in error and "--devices" in error


@pytest.mark.parametrize(
    ("dtype", "attention", "mlp"),
    [
        # 8 layers of 4 x 1024 x 1024 and of 3 x 1024 x 2048
        ("bfloat16", 64.0, 96.0),
        # and a float32 scale an output: 8 x 4 x 4 x 1024 B = 1/8 MiB; 8 x 4 x (2 x 2048 + 1024) B = 5/32 MiB
        ("int8", 32.125, 48.156),
        # half a byte each, and a scale for every 64 inputs: 16 tiles, and 32 of the down projection
        ("nf4", 16 + 16 / 8, 24 + 8 * 4 * (16 * 2 * 2048 + 32 * 1024) / 2**20),
    ],
)
def test_memory_of_quantised_kernels(capsys, dtype, attention, mlp):
    sizes = [f"--config.llama.{name}={value}" for name, value in LARGE.items()]
    table = params(capsys, "--config=tiny", *sizes, f"--config.llama.kernel_dtype={dtype}", "--config.lora.rank=64")
    for part, parameters, memory in (("attention", 32 * 2**20, attention), ("MLP", 48 * 2**20, mlp)):
        assert table[part].parameters == parameters
        assert table[part].memory == table[part].on_a_device == pytest.approx(memory, abs=0.05)
        assert table[part].stored_as == dtype
    assert table["embedding"][2:] == table["head"][2:] == (8.0, 8.0, "bfloat16")
    assert table["LoRA"].parameters == 2 * 2**20
    assert table["LoRA"][2:] == (8.0, 8.0, "float32")
    others = table["projectors"].memory + table["EVA-ViT"].memory
    assert table["all"].memory == pytest.approx(attention + mlp + 24 + others, abs=0.2)


def test_unknown_arguments(capsys):
    assert "unrecognized arguments: more; emollama params --help lists" in refused(capsys, "--config", "tiny", "more")
    assert "unrecognized arguments: --verbose" in refused(capsys, "--config=tiny", "--verbose")
    assert "--config.lora.rnk: no such field" in refused(capsys, "--config=tiny", "--config.lora.rnk=2")
    assert "tiny" in refused(capsys, "--config=tinny")
    assert "no experiment given" in refused(capsys)


def test_help(capsys):
    assert cli.main(["params", "--help"]) == 0
    assert "--config NAME_OR_PATH" in capsys.readouterr().out


def test_every_parameter_is_listed_on_request(capsys):
    assert cli.main(["params", "--config=tiny", "--each"]) == 0
    listed = capsys.readouterr().out
    assert "llama/layers/attn/q_proj/lora_a" in listed and "(3, 32, 8)" in listed and "trainable" in listed

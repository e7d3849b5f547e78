"""The experiments for named topologies: each names its own in the command of its docstring."""

import ast
import re
from pathlib import Path

import pytest

from emollama_jax.config import load_config
from emollama_jax.plan.plan import get_mesh_sizes
from emollama_jax.plan.topology import parse_topology

CONFIGS = Path(__file__).parents[2] / "configs"
TEXTS = {path.stem: ast.get_docstring(ast.parse(path.read_text())) for path in CONFIGS.glob("*.py")}
RECIPES = {
    name: re.findall(rf"emollama plan --config {name} --topology (\S+)", text)
    for name, text in TEXTS.items()
    if "emollama plan" in text
}


def test_there_are_recipes_for_the_machines_people_rent():
    assert {"v5e-1", "t4-1", "v5e-16", "v5e-256", "v5p-16", "v6e-16", "h100-8", "h200-1"} <= set(
        sum(RECIPES.values(), [])
    )


@pytest.mark.smoke
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_its_topology_and_trains_what_stage_1_trains(name):
    config, stage1 = load_config(name), load_config("stage1_merr")
    assert RECIPES[name]
    own_clips = name.startswith("colab_")
    for topology in map(parse_topology, RECIPES[name]):
        sizes = get_mesh_sizes(config, topology)
        assert config.data.batch_rows % (sizes["data"] * sizes["fsdp"] * config.train.grad_accum_steps) == 0
    assert (config.lora, config.trainable) == (stage1.lora, stage1.trainable)
    assert own_clips or config.prompt == stage1.prompt
    assert own_clips or config.data.batch_rows * config.train.steps == pytest.approx(16 * stage1.train.steps, rel=0.01)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipes_figures_are_called_what_they_are(name):
    assert re.search(r"compiler\s+estimates", TEXTS[name])
    assert re.search(r"\d+\.\d+ of \d+\.\d+ GiB", TEXTS[name])

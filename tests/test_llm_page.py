"""docs/llm.md: its figures are the formulas', its models the hub's, its recipe one that is valid."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

CONFIGURATIONS = {
    "STUDENT": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "TEACHER": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}
"""What the hub's config.json of Llama 3.1 8B and 70B say; both share keys among eight heads, and 128,256 tokens."""


@pytest.fixture(scope="module")
def plan(repository: Path) -> ModuleType:
    sys.path.insert(0, str(repository))
    try:
        import tools.llm_plan
    finally:
        sys.path.remove(str(repository))
    return tools.llm_plan


@pytest.fixture(scope="module")
def page(repository: Path) -> str:
    return (repository / "docs" / "llm.md").read_text(encoding="utf-8")


def test_its_tables_are_the_formulas(plan: ModuleType, page: str) -> None:
    assert plan.filled(page) == page, "run `make readme`"
    for name, table in plan.tables().items():
        assert len(table.splitlines()) > 5
        assert f"<!-- {name} -->\n{table}\n<!-- /{name} -->" in page


def test_what_is_switched_on_makes_it_fit(plan: ModuleType) -> None:
    needed = [sum(plan.estimate(now).values()) for now in plan.STEPS.values()]
    assert needed == sorted(needed, reverse=True)
    assert needed[0] > needed[1] > plan.MEMORY * 1e9 > needed[4] + 10e9


@pytest.mark.parametrize("name", list(CONFIGURATIONS))
def test_the_models_have_so_many_parameters(plan: ModuleType, name: str) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=128_256, num_key_value_heads=8, tie_word_embeddings=False, **CONFIGURATIONS[name]
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == getattr(plan, name).parameters


def test_the_recipe_is_the_plans(plan: ModuleType, page: str) -> None:
    from tutelage.recipe import Recipe

    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    recipe: Any = Recipe.model_validate(yaml.safe_load(text))
    assert recipe.train.batch_size / (plan.GPUS * recipe.train.accumulate) == plan.ROWS
    assert recipe.data.max_length == plan.LENGTH
    assert recipe.train.shard_head
    assert recipe.train.activation_checkpointing

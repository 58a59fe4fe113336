"""Every method of the catalogue on two processes against one: replicated, sharded, and with rows that do not count."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from contract import MODELS, NAMES, losses, on_tokens, recipe, tasks_of
from ranks import assert_same, failure, train
from safetensors.torch import load_file
from torch.testing import assert_close

from tutelage import catalogue
from tutelage.engine.needs import Setting, check_pairing
from tutelage.runs import distill

KINDS = {name: catalogue.describe(name)["kind"] for name in NAMES}
METHODS = [name for name, kind in KINDS.items() if kind == "Method"]
PROCEDURES = [name for name, kind in KINDS.items() if kind == "Procedure"]
COMBINED = ["kd+dist+fitnet", "rkd+reviewkd+crd", "taid+sinkd"]
RUNS = [(name, task) for name in METHODS + COMBINED for task in tasks_of(name)]

alone = cache(train)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
@pytest.mark.parametrize(("name", "task"), RUNS)
def test_two_ranks_train_as_one_process(name: str, task: str, sharding: str, masked: bool, pair: Any) -> None:
    if sharding in excluded(name):
        assert f"this launch is {sharding}" in refusal(name, sharding)
        return
    first, second = pair.run(train, name, sharding, masked, "fp32", task)
    for found in (first, second):
        assert_same(alone(name, "ddp", masked, "fp32", task), found)
    if masked:
        assert 0 in first["counted"] + second["counted"]
        assert first["counted"] != second["counted"]


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", PROCEDURES)
def test_a_procedure_on_two_ranks_is_that_of_one(name: str, sharding: str, pair: Any, tmp_path: Path) -> None:
    values = recipe(name, checkpoint={}, sharding=sharding)
    if name not in MODELS and not on_tokens(name):
        values |= {"teacher": {"model": "digits:mlp-12"}, "student": {"model": "digits:mlp-10"}}
    found = pair.run(distilled, values, str(tmp_path / "two"))
    if sharding in excluded(name):
        assert all(f"this launch is {sharding}: set train.sharding=ddp" in text for text in found)
        assert not (tmp_path / "two").exists()
        return
    assert found == ["done", "done"]
    single = values | {"train": values["train"] | {"sharding": "ddp"}}
    distill(single, folder=tmp_path / "one", progress=False)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5, abs=1e-5)
    weights = [load_file(tmp_path / run / "student" / "model.safetensors") for run in ("one", "two")]
    # Attention does not depend on its keys' biases: what AdamW makes of the rounding there is no sign of anything.
    assert_close(*weights, rtol=1e-4, atol=1e-4 if name in MODELS else 1e-5)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_bf16(sharding: str, pair: Any) -> None:
    """Rounded alike but for the size of a batch, in a loss that couples rows and one that does not."""
    for found in pair.run(train, "kd+dist", sharding, False, "bf16"):
        assert_same(alone("kd+dist", "ddp", False, "bf16"), found, tolerance=0.03)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_what_is_not_finite_on_one_rank_stops_both_before_the_weights_move(sharding: str, pair: Any) -> None:
    first, second = pair.run(failure, sharding)
    assert first == second
    assert first.startswith("step 1: the term")
    assert "not finite: inputs (the row)" in first


def excluded(name: str) -> set[str]:
    """Launches that one of the methods does not run under."""
    found = {catalogue.load(part).needs.sharding for part in name.split("+")}
    return {"ddp", "fsdp"} if "single" in found else {"fsdp"} if "ddp" in found else set()


def refusal(name: str, sharding: Any) -> str:
    parts = [(part, catalogue.load(part).needs) for part in name.split("+")]
    return "; ".join(
        reason
        for part, needs in parts
        for reason in check_pairing(
            part, needs, {}, Setting("classification", frozenset(), sharding=sharding)
        )
    )


def distilled(values: dict[str, Any], folder: str) -> str:
    """How a run ended, in a process of the pair."""
    try:
        return str(distill(values, folder=folder, progress=False).result["status"])
    except ValueError as error:
        return str(error)

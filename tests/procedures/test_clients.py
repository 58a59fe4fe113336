"""Clients of one run: Trainers that take turns, each with a folder, a seed and random numbers of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support import Net, rows
from tutelage.data import Data, DataInfo
from tutelage.engine.interrupt import Interrupted
from tutelage.engine.loop import Trainer
from tutelage.engine.needs import Needs
from tutelage.engine.runtime import Runtime
from tutelage.procedures.procedure import Artifacts, Procedure
from tutelage.procedures.run import Run
from tutelage.recipe import load_recipe
from tutelage.recipe.config import MethodConfig
from tutelage.tasks import build_task

ROUNDS, STEPS = 3, 2


class TwoClients(Procedure):
    """Two clients train students with dropout, ``STEPS`` steps a round, one after the other; those in ``absent`` never
    get a turn."""

    needs = Needs(teacher="none", fields=("target",))

    def __init__(self, absent: tuple[int, ...] = ()) -> None:
        super().__init__(MethodConfig(name="none"))
        self.absent = absent

    def run(self, run: Run) -> Artifacts:
        trainers = {
            f"client {i}": self._trainer(client, i)
            for i, client in enumerate(run.clients(2))
            if i not in self.absent
        }
        for done in range(ROUNDS):
            for trainer in trainers.values():
                # One that comes from a checkpoint may be ahead.
                trainer.run(max(0, (done + 1) * STEPS - trainer.step))
        models = {name: trainer.finished() for name, trainer in trainers.items()}
        return Artifacts(None, models=models)

    def _trainer(self, client: Run, i: int) -> Trainer:
        source = rows(24, seed=i)
        config = {"steps": ROUNDS * STEPS, "epochs": None, "checkpoint": {"every": 1}}
        return client.trainer("local", client.new_student(4), client.method("none"), source, config=config)


class StopAt:
    """A kill as a callback: at the given number of steps done by all clients together."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def on_step_end(self, trainer: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise Interrupted(15, trainer.step)


def workplace(folder: Path | None = None, callbacks: tuple[object, ...] = ()) -> Run:
    recipe = load_recipe(
        {
            "data": {"path": "digits"},
            "student": {"model": "digits:mlp-8"},
            "method": "none",
            "train": {
                "epochs": 1,
                "batch_size": 8,
                "device": "cpu",
                "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
            },
        }
    )
    info = DataInfo((6,), 4, None, None, None, frozenset({"target", "index"}))
    data = Data(rows(), None, None, info, {})
    return Run(
        recipe,
        Runtime("cpu"),
        data,
        build_task("classification", 4),
        lambda outputs: Net(dropout=0.5, classes=outputs, seed=3),
        folder=folder,
        callbacks=callbacks,
    )


def weights(artifacts: Artifacts) -> dict[str, dict[str, Tensor]]:
    return {name: model.state_dict() for name, model in artifacts.models.items()}


def assert_equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


@pytest.fixture(scope="module")
def together() -> dict[str, dict[str, Tensor]]:
    return weights(TwoClients().run(workplace()))


@pytest.mark.parametrize("other", [0, 1])
def test_clients_that_take_turns_end_with_the_bits_of_each_alone(other: int, together: Any) -> None:
    alone = weights(TwoClients(absent=(other,)).run(workplace()))
    (name,) = alone
    assert_equal(alone[name], together[name])


def test_clients_draw_their_own_random_numbers(together: Any) -> None:
    """Equal students on different rows with different dropout: nothing is shared by accident."""
    first, second = workplace().clients(2)
    assert first.seed != second.seed
    one, two = first.generator("x"), second.generator("x")
    assert not torch.equal(torch.rand(4, generator=one), torch.rand(4, generator=two))
    assert not torch.equal(together["client 0"]["head.weight"], together["client 1"]["head.weight"])


@pytest.mark.parametrize("stop", [1, 3, 6, 11])
def test_clients_that_were_killed_go_on_with_the_same_bits(stop: int, tmp_path: Path, together: Any) -> None:
    with pytest.raises(Interrupted):
        TwoClients().run(workplace(tmp_path, (StopAt(stop),)))
    resumed = weights(TwoClients().run(workplace(tmp_path)))
    for name, values in together.items():
        assert_equal(values, resumed[name])
    assert sorted(path.name for path in (tmp_path / "clients").iterdir()) == ["0", "1"]


def test_a_module_is_what_a_client_trains(together: Any) -> None:
    models = TwoClients().run(workplace()).models
    assert all(isinstance(model, nn.Module) and not model.training for model in models.values())

"""The loop: what a step is, in which order things happen, and what it refuses."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from training import assert_same, make_trainer, train

import probes
from support import Losses, Net, Rows, rows, train_config
from tutelage.engine import events
from tutelage.engine.finite import NonFiniteError
from tutelage.engine.loop import Trainer
from tutelage.engine.runtime import Runtime
from tutelage.engine.types import Batch
from tutelage.engine.validation import Validation
from tutelage.recipe.schema import CheckpointConfig, EarlyStopConfig, OptimizerConfig
from tutelage.tasks import build_task


def test_the_listing_is_what_a_probe_sees(tmp_path: Any) -> None:
    """Every line of the listing in `engine/events.py`, in its order."""
    method = probes.Order()
    calls = method.calls

    class Watch:
        def __getattr__(self, name: str) -> Any:
            raise AttributeError(name)

    for event in events.EVENTS:
        setattr(Watch, f"on_{event}", lambda self, trainer, *details, event=event: calls.append(event))
    source = rows(8)
    trainer = Trainer(
        Runtime("cpu"),
        Net(),
        method,
        build_task("classification", 4),
        source,
        train_config(epochs=1, clip=1.0),
        validation=Validation(lambda trainer: {"accuracy": 0.5}),
        folder=tmp_path,
        callbacks=[Watch()],
    )
    spy(trainer, calls)
    trainer.fit()
    listed = re.findall(r"^    +([a-z_.?]+)", events.__doc__ or "", re.M)
    calls.remove("method.after_evaluation")  # the listing names it in the line of its event
    assert list(dict.fromkeys(calls)) == listed


def spy(trainer: Trainer, calls: list[str]) -> None:
    def watch(owner: Any, name: str, label: str) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            calls.append(label)
            return original(*args, **kwargs)

        setattr(owner, name, watched)

    watch(trainer.gradients, "backward", "backward")
    watch(trainer.guard, "inspect", "finite?")
    watch(trainer.optimizers["main"].optimizer, "step", "optimisers")
    import tutelage.engine.loop as loop

    original = loop.clip_
    loop.clip_ = lambda *args: (calls.append("clip"), original(*args))[1]  # type: ignore[assignment]
    trainer.events.add(type("Undo", (), {"on_fit_end": lambda self, t: setattr(loop, "clip_", original)})())


@pytest.mark.parametrize("name", ["none", "kd", "nkd"])
def test_accumulation_gives_the_same_step(name: str) -> None:
    assert_same(train(name, batch_size=32), train(name, batch_size=32, accumulate=4), tolerance=1e-6)


def test_accumulation_counts_valid_rows() -> None:
    """Micro-batches with unequal numbers of valid rows are weighed by those, not alike."""

    class Masked(probes.Probe):
        needs = probes.Needs(teacher="none", logits=())

        def transform(self, batch: Batch, ctx: Any) -> Batch:
            assert batch.index is not None
            return batch.replace(mask=batch.index < 5)

        def objective(self, student: Any, teacher: Any, batch: Batch, ctx: Any) -> Any:
            return {"label": ctx.label_loss(student, batch)}

    def run_masked(accumulate: int) -> dict[str, Any]:
        losses = Losses()
        trainer = Trainer(
            Runtime("cpu"),
            Net(),
            Masked(),
            build_task("classification", 4),
            rows(16),
            train_config(batch_size=16, accumulate=accumulate),
            callbacks=[losses],
        )
        trainer.run()
        weights = {name: p.detach() for name, p in trainer.parameters.items()}
        return {"losses": losses.steps, "weights": weights, "buffers": {}}

    assert_same(run_masked(1), run_masked(8), tolerance=1e-6)


def test_clipping_bounds_the_gradient() -> None:
    free, clipped = make_trainer("none"), make_trainer("none", clip=1e-3)
    start = {name: p.detach().clone() for name, p in free.parameters.items()}
    free.run(1)
    clipped.run(1)
    norm = free.last[1]
    for name, value in clipped.parameters.items():
        wanted = start[name] + (free.parameters[name] - start[name]) * 1e-3 / norm
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-7)


def test_bf16_trains_in_float32_weights() -> None:
    trainer = make_trainer("kd")
    low = Trainer(
        Runtime("cpu", "bf16"),
        Net(seed=2),
        probes_kd(),
        build_task("classification", 4),
        rows(),
        train_config(precision="bf16"),
        teachers=trainer.setup.teachers,
    )
    trainer.run()
    low.run()
    for name, value in low.parameters.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, trainer.parameters[name], rtol=0.05, atol=0.02)
    assert any(not torch.equal(value, trainer.parameters[name]) for name, value in low.parameters.items())


def probes_kd() -> Any:
    from training import make_method

    return make_method("kd", {})


def test_fp16_on_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match="fp16 needs an accelerator"):
        Runtime("cpu", "fp16")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_losses_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    import tutelage.engine.setup as setup
    from tutelage.engine.compile import compile_regions

    monkeypatch.setattr(
        setup, "compile_regions", lambda model, taps: compile_regions(model, taps, backend="aot_eager")
    )
    assert_same(train("fitnet", {"hint_layer": 1}), train("fitnet", {"hint_layer": 1}, compile=True))


def test_the_moving_average_is_what_ships() -> None:
    trainer = make_trainer("none", ema=0.5)
    trainer.run(1)
    first = {name: p.detach().clone() for name, p in trainer.student.model.named_parameters()}
    trainer.run(1)
    for name, value in trainer.finished().named_parameters():
        now = dict(trainer.student.model.named_parameters())[name]
        torch.testing.assert_close(value, 0.5 * first[name] + 0.5 * now)
    averaged = trainer.predict(trainer.example).logits
    torch.testing.assert_close(averaged, trainer.finished()(trainer.example.inputs))


def test_early_stop_and_best_checkpoint(tmp_path: Any) -> None:
    values = iter([0.2, 0.9, 0.5, 0.4, 0.3, 0.2])
    trainer = Trainer(
        Runtime("cpu"),
        Net(),
        make_trainer("none").method.__class__(probes.config()),
        build_task("classification", 4),
        rows(8),
        train_config(epochs=6, early_stop=EarlyStopConfig(metric="accuracy", patience=2)),
        validation=Validation(lambda trainer: {"accuracy": next(values)}, best=("accuracy", True)),
        folder=tmp_path,
    )
    trainer.fit()
    assert trainer.progress.stopped_early
    assert trainer.step == 4
    assert trainer.progress.best_step == 2
    best = trainer.checkpoints.best()
    assert best is not None
    assert best.step == 2


@pytest.mark.parametrize("place", ["inputs", "teacher", "loss"])
def test_not_finite_stops_before_the_weights_move(place: str) -> None:
    trainer = make_trainer("kd")
    if place == "inputs":
        trainer.source.inputs[:] = float("nan")
    elif place == "teacher":
        with torch.no_grad():
            trainer.setup.teachers["teacher"].module.model.head.bias[0] = float("nan")
    else:
        trainer.method.config = trainer.method.config.model_copy(update={"loss_weight": float("inf")})
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    expected = {"inputs": "inputs", "teacher": "teacher teacher logits", "loss": "kd"}[place]
    with pytest.raises(NonFiniteError, match=expected) as caught:
        trainer.run()
    assert "step 0" in str(caught.value) or "step 1" in str(caught.value)
    assert all(torch.equal(p, before[name]) for name, p in trainer.parameters.items())


def test_a_batch_larger_than_the_data() -> None:
    with pytest.raises(ValueError, match="batch_size is 64, but an epoch has 32 rows"):
        make_trainer("none", batch_size=64)


def test_no_rows() -> None:
    with pytest.raises(ValueError, match="no rows"):
        Trainer(
            Runtime("cpu"),
            Net(),
            probes_kd(),
            build_task("classification", 4),
            Rows(torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64)),
            train_config(),
        )


def test_a_callback_that_listens_to_nothing() -> None:
    class Wrong:
        def on_step(self, trainer: Any) -> None: ...

    with pytest.raises(TypeError, match="on_step"):
        make_trainer("none").events.add(Wrong())


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "rmsprop"])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_resume_is_bit_exact(name: str, stop: int, tmp_path: Any) -> None:
    def trainer(folder: Any) -> Trainer:
        return Trainer(
            Runtime("cpu"),
            Net(dropout=0.3, seed=3),
            make_trainer("none").method.__class__(probes.config()),
            build_task("classification", 4),
            rows(),
            train_config(
                steps=7,
                optimizer=OptimizerConfig(name=name, lr=0.01),
                checkpoint=CheckpointConfig(every=1),
                schedule={"name": "cosine", "warmup": 0.2},
                ema=0.9,
            ),
            folder=folder,
        )

    whole = trainer(None)
    whole.run()
    first = trainer(tmp_path)
    first.run(stop)
    second = trainer(tmp_path)
    second.fit()
    assert second.step == 7
    assert all(torch.equal(p, second.parameters[n]) for n, p in whole.parameters.items())
    averaged = zip(whole.finished().parameters(), second.finished().parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in averaged)


@pytest.mark.parametrize("name", probes.ALL)
def test_every_probe_resumes(name: str, tmp_path: Any) -> None:
    def trainer(folder: Any) -> Trainer:
        made = make_trainer(name, checkpoint=CheckpointConfig(every=1))
        if folder:
            from tutelage.engine.checkpoint import CheckpointFolder

            made.checkpoints = CheckpointFolder(folder, 2)
        return made

    whole = trainer(None)
    whole.run()
    trainer(tmp_path).run(3)
    second = trainer(tmp_path)
    second.fit()
    assert all(torch.equal(p, second.parameters[n]) for n, p in whole.parameters.items())
    buffers = dict(second.method.named_buffers())
    assert all(torch.equal(b, buffers[n]) for n, b in whole.method.named_buffers())


def test_a_checkpoint_of_another_method(tmp_path: Any) -> None:
    from tutelage.engine.checkpoint import CheckpointError, CheckpointFolder

    made = make_trainer("Memory")
    made.checkpoints = CheckpointFolder(tmp_path, 2)
    made.run(1)
    made.save()
    other = make_trainer("InsideBlock")
    other.checkpoints = CheckpointFolder(tmp_path, 2)
    with pytest.raises(CheckpointError, match="another recipe"):
        other.restore()


def test_no_view_of_the_global_generators() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    make_trainer("none", student=Net(dropout=0.5)).run()
    assert torch.equal(torch.rand(3), wanted)


def test_learning_rates_by_layer() -> None:
    trainer = make_trainer("none", optimizer=OptimizerConfig(name="adamw", lr=0.1, layer_decay=0.5))
    rates = {group["lr"] for group in trainer.optimizers["main"].optimizer.param_groups}
    assert max(rates) == pytest.approx(0.1)
    assert len(rates) > 1


def test_a_module_that_takes_no_part_is_named() -> None:
    class Nothing(probes.Probe):
        def step(self, ctx: Any) -> Any:
            from tutelage.engine.types import Term

            return {"nothing": Term(torch.zeros(()))}

    trainer = Trainer(
        Runtime("cpu"), Net(), Nothing(), build_task("classification", 4), rows(), train_config(),
        teachers=make_trainer("kd").setup.teachers,
    )  # fmt: skip
    with pytest.raises(ValueError, match="no term reaches a trainable parameter"):
        trainer.run(1)


def test_a_student_without_gradients_is_named() -> None:
    student = Net()
    student.requires_grad_(False)
    with pytest.raises((ValueError, RuntimeError)):
        make_trainer("none", student=student)
    assert isinstance(student, nn.Module)

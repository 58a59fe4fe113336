"""Optimisers of a run: who owns which parameter, the rate of a step, and state that goes by parameter names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tutelage.engine.method import OptimSpec
from tutelage.engine.optim_groups import parameter_groups
from tutelage.engine.optim_names import OptimError, optimizer_factory
from tutelage.engine.schedules import Scheduler, build_schedule
from tutelage.recipe.schema import OptimizerConfig, ScheduleConfig

__all__ = ["Optim", "OptimError", "build_optimizers"]

_IMPLEMENTATION = ("params", "fused", "foreach", "capturable", "differentiable")
"""What of a group says how this machine computes; a state saved elsewhere must not change it."""


@dataclass
class Optim:
    """An optimiser, its schedule, and the names of its parameters in its own order."""

    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    names: list[str]

    def set_step(self, step: int) -> None:
        """Set the rates for a step, counted from 0 over the whole run; to be called before it."""
        self.scheduler.set_step(step)

    @property
    def lr(self) -> float:
        """The current learning rate: with ``layer_decay``, that of the topmost layer."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by ``<parameter name>/<key>`` (those of a group by ``@group.<i>/<key>``), and the rest as JSON.

        Tensors are the live ones, not copies; those of sharded parameters are DTensors. Options of a group that are
        neither numbers, text nor tuples of those (a dtype) are left out, as is the choice of implementation: they
        come from recipe and machine again.
        """
        tensors: dict[str, Tensor] = {}
        values: dict[str, dict[str, Any]] = {}
        for name, parameter in zip(self.names, self._parameters(), strict=True):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{name}/{key}"] = value
                elif isinstance(value, bool | int | float | str | None):
                    values.setdefault(name, {})[key] = value
                else:
                    raise OptimError(
                        f"{self._kind} keeps a {type(value).__name__} as {key!r}, which no checkpoint can hold"
                    )
        groups = []
        for index, (names, group) in enumerate(self._groups()):
            options = {key: value for key, value in group.items() if key not in _IMPLEMENTATION}
            tensors |= {
                f"@group.{index}/{key}": value for key, value in options.items() if isinstance(value, Tensor)
            }
            plain = {key: _to_json(value) for key, value in options.items() if _is_plain(value)}
            groups.append({"names": names, "options": plain})
        state = {
            "optimizer": self._kind,
            "groups": groups,
            "values": values,
            "schedule": self.scheduler.state(),
        }
        return tensors, state

    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Take over a saved state, bit for bit; the order of the parameters may differ from the saved one's.

        Tensors are copied to their parameters' devices, in the dtype they have.

        Raises:
            OptimError: it belongs to another optimiser or to other parameters. Nothing is changed then.
        """
        saved = {name: index for index, group in enumerate(state["groups"]) for name in group["names"]}
        self._check(state, saved, tensors)
        self.scheduler.load(state["schedule"])
        by_name = dict(zip(self.names, self._parameters(), strict=True))
        self.optimizer.state.clear()
        for name, values in state["values"].items():
            self.optimizer.state[by_name[name]].update(values)
        for entry, tensor in tensors.items():
            name, key = entry.rsplit("/", 1)
            if name in by_name:
                self.optimizer.state[by_name[name]][key] = self._place(key, tensor, by_name[name])
        for names, group in self._groups():
            index = saved[names[0]]
            for key, value in state["groups"][index]["options"].items():
                group[key] = _like(group.get(key), value)
            prefix = f"@group.{index}/"
            group |= {
                key.removeprefix(prefix): tensors[key].clone() for key in tensors if key.startswith(prefix)
            }

    @property
    def _kind(self) -> str:
        return type(self.optimizer).__name__

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _groups(self) -> list[tuple[list[str], dict[str, Any]]]:
        names = iter(self.names)
        return [([next(names) for _ in group["params"]], group) for group in self.optimizer.param_groups]

    def _place(self, key: str, tensor: Tensor, parameter: Tensor) -> Tensor:
        group = self.optimizer.param_groups[0]
        if key == "step" and not (group.get("fused") or group.get("capturable")):
            return tensor.detach().to("cpu", copy=True)  # torch counts on the host unless the kernel reads it
        if tensor.shape != parameter.shape or isinstance(tensor, DTensor) != isinstance(parameter, DTensor):
            return tensor.detach().to(parameter.device, copy=True)
        # Fused kernels walk parameter and state side by side in memory: a channels_last one needs its like.
        return torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False).copy_(tensor.detach())

    def _check(
        self, state: Mapping[str, Any], saved: Mapping[str, int], tensors: Mapping[str, Tensor]
    ) -> None:
        if state["optimizer"] != self._kind:
            raise OptimError(f"the saved state is of {state['optimizer']}; this optimiser is {self._kind}")
        if differing := saved.keys() ^ set(self.names):
            raise OptimError(
                f"the saved state has other parameters than {self._kind} has now: {_some(differing)}"
            )
        owners = {entry.rsplit("/", 1)[0] for entry in tensors if not entry.startswith("@group.")}
        if foreign := owners - saved.keys():
            raise OptimError(
                f"saved tensors belong to parameters that {self._kind} does not have: {_some(foreign)}"
            )
        for names, _ in self._groups():
            if len({str(state["groups"][saved[name]]["options"]) for name in names}) > 1:
                raise OptimError(
                    f"one parameter group of {self._kind} now was several when saved: {_some(names)}"
                )


def build_optimizers(
    named_parameters: Mapping[str, nn.Parameter],
    specs: Mapping[str, OptimSpec],
    default: OptimizerConfig,
    schedule: ScheduleConfig,
    total_steps: int,
    *,
    student: nn.Module | None = None,
) -> dict[str, Optim]:
    """The optimisers of a run, by name; the rates of step 0 are set.

    Args:
        named_parameters: of the trained whole (``student.…``, ``method.…``, ``teachers.<name>.…``); frozen ones are
            passed over.
        specs: each trainable parameter belongs to the first one with a pattern that matches its name.
        default, schedule: for specs that say none of their own.
        student: asked for its layers (timm's ``group_matcher``) where there is a ``layer_decay``.

    Raises:
        OptimError: a trainable parameter that no spec matches, a spec without any, or options that do not fit.
    """
    trainable = {name: parameter for name, parameter in named_parameters.items() if parameter.requires_grad}
    owners = _assign(trainable, specs)
    return {
        name: _build(
            {parameter: trainable[parameter] for parameter in owners[name]},
            spec.optimizer or default,
            spec.schedule or schedule,
            total_steps,
            student,
        )
        for name, spec in specs.items()
    }


def _assign(trainable: Mapping[str, nn.Parameter], specs: Mapping[str, OptimSpec]) -> dict[str, list[str]]:
    owners: dict[str, list[str]] = {name: [] for name in specs}
    orphans: list[str] = []
    for parameter in trainable:
        owner = next((name for name, spec in specs.items() if _matches(parameter, spec)), None)
        (orphans if owner is None else owners[owner]).append(parameter)
    if orphans:
        have = ", ".join(pattern for spec in specs.values() for pattern in spec.patterns)
        raise OptimError(
            f"no optimiser trains {_some(orphans)}; add a pattern or freeze them (patterns: {have})"
        )
    for name, spec in specs.items():
        if not owners[name]:
            taken = any(_matches(parameter, spec) for parameter in trainable)
            reason = (
                "earlier optimisers own all that it matches" if taken else "no trainable parameter matches it"
            )
            known = sorted({f"{parameter.split('.')[0]}.*" for parameter in trainable})
            raise OptimError(
                f"optimiser {name!r} {list(spec.patterns)} has no parameters: {reason}; there are {known}"
            )
    return owners


def _build(
    parameters: dict[str, nn.Parameter],
    config: OptimizerConfig,
    schedule: ScheduleConfig,
    total_steps: int,
    student: nn.Module | None,
) -> Optim:
    factory, decays = optimizer_factory(config, list(parameters.values()))
    groups = parameter_groups(parameters, config, decays=decays, student=student)
    try:
        optimizer = factory(
            [{"params": [parameters[name] for name in names], **options} for names, options in groups]
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptimError(f"optimizer {config.name!r} refuses its options: {error}") from error
    _begin_momentum(optimizer)
    names = [name for members, _ in groups for name in members]
    optim = Optim(optimizer, build_schedule(optimizer, schedule, total_steps), names)
    optim.set_step(0)
    return optim


def _begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Momentum of fused SGD begins at zero, which without dampening is what torch computes too: its kernel refuses a
    parameter whose first gradient comes later than others'."""
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        if group["fused"] and group["momentum"] and not group["dampening"]:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _matches(name: str, spec: OptimSpec) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in spec.patterns)


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
    return ", ".join(listed[:8]) + more


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return isinstance(value, bool | int | float | str | None)


def _to_json(value: Any) -> Any:
    return [_to_json(item) for item in value] if isinstance(value, tuple | list) else value


def _like(live: Any, saved: Any) -> Any:
    """JSON turned tuples into lists; the live group knows which they were."""
    if isinstance(live, tuple) and isinstance(saved, list):
        return tuple(_like(old, new) for old, new in zip(live, saved, strict=True))
    return saved

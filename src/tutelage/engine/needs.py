"""What a method needs and what teachers, data and launches offer; both meet before the first step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LogitForm = Literal["dense", "topk", "sampled"]
LogitScale = Literal["raw", "log_probs"]


@dataclass(frozen=True)
class Needs:
    """What a method cannot do without.

    Attributes:
        teacher: ``none``; ``frozen`` (its outputs are enough); ``trained`` (it learns too).
        logits: forms of teacher logits that serve; empty: none are read.
        scale: ``raw`` where probabilities are not enough.
        teacher_taps: inner tensors of the teacher are read.
        live: a store cannot serve, since inputs change in ``transform`` or ``step``.
        input_gradient: gradients flow through the teacher to its inputs.
        text: the teacher writes text.
        split: the student runs from an inner tensor on.
        fields: what a batch must carry (``target``, ``index``, ``mask``, or a column's name).
        loaders: further loaders the method draws from, by name.
        views: views of a row in a batch.
        couples_rows: the loss of a row depends on the other rows of its micro-batch: through the ``loss``, whose
            ``objective`` then sees the rows of all ranks (`Method.terms`), or through a ``norm`` of the method's own,
            whose statistics are taken over all ranks.
        mixes_rows: rows get partners from among the rows of their micro-batch on this rank. So one process gives the
            losses of several only where it cuts a step into as many parts as they do.
        sharding: launches that give the single process's losses.
        dynamic: which parameters get gradients changes between steps.
        tasks: tasks it is defined for.
    """

    teacher: Literal["none", "frozen", "trained"] = "frozen"
    logits: tuple[LogitForm, ...] = ("dense",)
    scale: LogitScale = "raw"
    teacher_taps: bool = False
    live: bool = False
    input_gradient: bool = False
    text: bool = False
    split: bool = False
    fields: tuple[str, ...] = ()
    loaders: tuple[str, ...] = ()
    views: int = 1
    couples_rows: Literal["loss", "norm"] | None = None
    mixes_rows: bool = False
    sharding: Literal["any", "ddp", "single"] = "any"
    dynamic: bool = False
    tasks: tuple[str, ...] = ("classification",)

    def describe(self) -> list[str]:
        """Short strings for the catalogue."""
        words: list[str] = []
        if self.teacher == "none":
            words.append("no teacher")
        else:
            words.append("trained teacher" if self.teacher == "trained" else "teacher")
            if self.logits:
                raw = "raw " if self.scale == "raw" else ""
                words.append(f"{raw}teacher logits ({' or '.join(self.logits)})")
        flags = {
            "teacher_taps": "teacher features",
            "live": "live teacher",
            "input_gradient": "gradient through the teacher",
            "text": "text teacher",
            "split": "a student that can be split",
            "mixes_rows": "mixes the rows of a batch",
            "couples_rows": "couples the rows of a batch",
        }
        words += [text for name, text in flags.items() if getattr(self, name)]
        words += [f"batch field {name}" for name in self.fields]
        words += [f"loader {name}" for name in self.loaders]
        if self.views > 1:
            words.append(f"{self.views} views a row")
        if self.sharding != "any":
            words.append("DDP at most" if self.sharding == "ddp" else "a single process")
        return words


@dataclass(frozen=True)
class Offers:
    """What a teacher can give."""

    logits: LogitForm | None = "dense"
    scale: LogitScale = "raw"
    taps: bool = True
    live: bool = True
    input_gradient: bool = True
    trainable: bool = True
    text: bool = False


@dataclass(frozen=True)
class Setting:
    """What data, task and launch give beside the teachers."""

    task: str
    fields: frozenset[str]
    loaders: frozenset[str] = frozenset()
    views: int = 1
    sharding: Literal["single", "ddp", "fsdp"] = "single"


class PairingError(ValueError):
    """A method, a teacher and data that cannot work together."""


def check_pairing(name: str, needs: Needs, teachers: dict[str, Offers], setting: Setting) -> list[str]:
    """Every reason why the method cannot run here; empty where it can."""
    reasons: list[str] = []
    if setting.task not in needs.tasks:
        reasons.append(
            f"`{name}` is defined for {', '.join(needs.tasks)}; this recipe's task is {setting.task}"
        )
    if needs.teacher != "none" and not teachers:
        reasons.append(f"`{name}` needs a teacher; give `teacher:` in the recipe")
    if needs.teacher != "none":
        for teacher, offers in teachers.items():
            reasons += [f"`{name}` {reason} (teacher `{teacher}`)" for reason in _teacher_gaps(needs, offers)]
    for wanted in needs.fields:
        if wanted not in setting.fields:
            have = ", ".join(sorted(setting.fields)) or "nothing"
            reasons.append(
                f"`{name}` needs `{wanted}` in every batch; this data gives {have} (see data.columns)"
            )
    for wanted in needs.loaders:
        if wanted not in setting.loaders:
            reasons.append(f"`{name}` needs the further data `{wanted}`; set data.{wanted}")
    if needs.views > setting.views:
        reasons.append(f"`{name}` needs {needs.views} views a row; set data.views")
    if needs.sharding == "single" and setting.sharding != "single":
        reasons.append(f"`{name}` runs in a single process only; this launch is {setting.sharding}")
    if needs.sharding == "ddp" and setting.sharding == "fsdp":
        reasons.append(
            f"`{name}` runs replicated (DDP), not sharded; this launch is fsdp: set train.sharding=ddp"
        )
    return reasons


def _teacher_gaps(needs: Needs, offers: Offers) -> list[str]:
    gaps: list[str] = []
    if needs.logits and offers.logits not in needs.logits:
        gaps.append(f"needs {' or '.join(needs.logits)} logits; this teacher gives {offers.logits or 'none'}")
    if needs.logits and needs.scale == "raw" and offers.scale != "raw":
        gaps.append("needs raw logits; this teacher gives log-probabilities")
    checks = {
        "teacher_taps": (offers.taps, "needs inner features; this teacher gives none"),
        "live": (offers.live, "needs a live teacher; this one is stored"),
        "input_gradient": (offers.input_gradient, "needs gradients through the teacher; this one gives none"),
        "text": (offers.text, "needs a teacher that writes text; this one does not"),
    }
    gaps += [text for name, (offered, text) in checks.items() if getattr(needs, name) and not offered]
    if needs.teacher == "trained" and not offers.trainable:
        gaps.append("trains its teacher; this one cannot be trained")
    return gaps

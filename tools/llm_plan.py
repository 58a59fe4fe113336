"""Writes the tables of docs/llm.md's worked plan, from the formulas by which `tutelage run --dry-run` counts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tutelage.engine.memory import ModelSize, Situation, estimate

TARGET = Path(__file__).resolve().parent.parent / "docs" / "llm.md"

STUDENT = ModelSize.transformer(width=4096, inner=14336, layers=32, keys=1024, vocabulary=128_256)
TEACHER = ModelSize.transformer(width=8192, inner=28672, layers=80, keys=1024, vocabulary=128_256, itemsize=2)
"""meta-llama/Llama-3.1-8B in float32 and meta-llama/Llama-3.1-70B in bfloat16, by their configurations."""

ROWS, LENGTH, GPUS, MEMORY = 2, 4096, 8, 80
TOKENS, RATE, STORED = 10**9, 400e12, 304
"""Tokens of a run; operations a second that large bfloat16 products reach on a GPU; bytes of a stored token, k = 50."""

SHARED = Situation(
    STUDENT, (TEACHER,), ROWS * LENGTH, ranks=GPUS, half=True, fused=False, sharded=True, accelerator=True
)
FUSED = dataclasses.replace(SHARED, shard_teacher=True, fused=True)
PLAN = dataclasses.replace(FUSED, recomputed=True)
STEPS = {
    "a copy in every process (`ddp`), logits made whole": dataclasses.replace(SHARED, sharded=False),
    "`sharding: fsdp`, the teacher too": dataclasses.replace(SHARED, shard_teacher=True),
    "and `method.fused: true`": FUSED,
    "and `activation_checkpointing: true`": PLAN,
    "and `shard_head: true`": dataclasses.replace(PLAN, shard_head=True),
    "and `offload_teacher: true`": dataclasses.replace(PLAN, shard_head=True, offload_teacher=True),
    "or, in its place, a store of the teacher's answers": dataclasses.replace(
        PLAN, shard_head=True, teachers=()
    ),
}


def tables() -> dict[str, str]:
    """By the name of their place on the page."""
    return {"steps": steps_table(), "parts": parts_table(), "work": work_table()}


def steps_table() -> str:
    rows = [f"| {name} | {gb(sum(estimate(now).values()))} |" for name, now in STEPS.items()]
    return "\n".join(["| what is switched on | GB a GPU |", "|---|---:|", *rows])


def parts_table() -> str:
    rows = [f"| {name} | {gb(size)} |" for name, size in estimate(STEPS["and `shard_head: true`"]).items()]
    return "\n".join(["| for | GB a GPU |", "|---|---:|", *rows])


def work_table() -> str:
    """What the run costs in time and space, beside a GPU's memory."""
    teacher, student = 2 * TEACHER.parameters, 6 * STUDENT.parameters
    again = 2 * STUDENT.parameters
    live, stored = (hours(each) for each in (teacher + student + again, student + again))
    rows = [
        ("teacher's forward, operations a token", f"{teacher / 1e9:.0f} billion"),
        ("student's forward and backward", f"{student / 1e9:.0f} billion"),
        ("the forward computed again", f"{again / 1e9:.0f} billion"),
        ("hours of all GPUs, with the teacher", f"{live:.0f}"),
        ("hours without it, from a store", f"{stored:.0f}"),
        ("the store", f"{TOKENS * STORED / 1e9:.0f} GB"),
        ("a checkpoint: weights and both AdamW states", f"{gb(3 * STUDENT.bytes)} GB"),
        (
            "CPU memory while models are read, all processes",
            f"{gb(GPUS * (TEACHER.bytes + STUDENT.bytes))} GB",
        ),
        ("a GPU at the end, when the student is made whole, beside its shards", f"{gb(STUDENT.bytes)} GB"),
    ]
    return "\n".join(["| what | how much |", "|---|---:|", *(f"| {what} | {much} |" for what, much in rows)])


def hours(operations: float) -> float:
    return TOKENS * operations / (GPUS * RATE) / 3600


def gb(size: float) -> str:
    return f"{size / 1e9:.1f}" if size < 1e11 else f"{size / 1e9:.0f}"


def filled(text: str) -> str:
    """The page with its tables made anew."""
    for name, table in tables().items():
        before, rest = text.split(f"<!-- {name} -->")
        after = rest.split(f"<!-- /{name} -->")[1]
        text = f"{before}<!-- {name} -->\n{table}\n<!-- /{name} -->{after}"
    return text


if __name__ == "__main__":
    TARGET.write_text(filled(TARGET.read_text(encoding="utf-8")), encoding="utf-8")

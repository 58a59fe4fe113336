"""The ``cache`` part of a recipe: how a teacher's outputs are stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from tutelage.recipe.config import Config
from tutelage.recipe.parts import Text

Form = Literal["dense", "topk", "sampled", "none"]
Dtype = Literal["float32", "float16", "bfloat16", "float8_e4m3fn", "int8"]


class CacheConfig(Config):
    """What `tutelage cache` keeps of a teacher's outputs."""

    form: Form = Field(
        "dense",
        description="dense: all logits; topk: the k largest log-probabilities and the mass of the rest; sampled: k "
        "draws with weights that make them unbiased; none: inner features alone.",
    )
    k: int | None = Field(None, ge=1, le=65_536, description="topk, sampled: entries a row.")
    scale: Literal["raw", "log_probs"] = Field(
        "raw", description="dense: logits as they are, or log-probabilities."
    )
    dtype: Dtype = Field(
        "float32",
        description="Of dense logits and features; float8_e4m3fn and int8 have a scale a row. topk and sampled take "
        "16 bits a value.",
    )
    draw_temperature: float = Field(
        1.0, gt=0, le=10, description="sampled: entries are drawn in proportion to p^(1/draw_temperature)."
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="sampled: seed of the draws.")
    taps: tuple[Text, ...] = Field(
        (),
        description="Inner tensors of the teacher to keep, by path or pattern, beside those that the recipe's methods "
        "read.",
    )
    batch_size: int = Field(256, ge=1, description="Rows a forward pass of the teacher.")
    shard_rows: int | None = Field(
        None, ge=1, description="Rows a file; left out: what makes 128 MiB, at most 16384."
    )

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> list[str]:
        form, reasons = values["form"], []
        if form in ("topk", "sampled") and values["k"] is None:
            reasons.append(f"form {form} needs k, the entries that are kept of a row")
        if form in ("dense", "none") and values["k"] is not None:
            reasons.append(f"k goes with form topk or sampled; form is {form}")
        if form != "dense" and values["scale"] == "log_probs":
            reasons.append(
                f"scale goes with form dense; form is {form} (topk and sampled are probabilities anyway)"
            )
        if form != "sampled" and values["draw_temperature"] != 1.0:
            reasons.append(f"draw_temperature goes with form sampled; form is {form}")
        return reasons

"""How a model writes text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from tutelage.recipe.config import Config


class GenerationConfig(Config):
    """How a model goes on from a prompt: its likeliest token each time, the likeliest of several beams, or drawn."""

    max_new_tokens: int = Field(
        128, ge=1, le=2**20, description="Most tokens of an answer; it ends before at the model's stop token."
    )
    beams: int = Field(1, ge=1, le=1024, description="Answers followed side by side; 1: the likeliest token.")
    do_sample: bool = Field(False, description="Draw each token from the model's distribution.")
    temperature: float = Field(
        1.0, gt=0, le=100, description="do_sample: what logits are divided by before a token is drawn."
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="do_sample: draw from the likeliest tokens that hold this mass."
    )
    batch_size: int = Field(32, ge=1, description="Prompts that are gone on from at once.")

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> list[str]:
        if values["do_sample"] is True:
            return ["beams are not drawn: give beams, or do_sample"] if values["beams"] != 1 else []
        drawn = [name for name in ("temperature", "top_p") if values[name] != 1]
        return [f"{' and '.join(drawn)} only together with do_sample"] if drawn else []

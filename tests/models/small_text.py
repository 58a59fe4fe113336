"""Small text models of several families, made on the spot."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tutelage.models import BuiltModel, Vocabulary, build_model
from tutelage.recipe.schema import ModelConfig

TOKENS = Vocabulary(100, bos=1, eos=2, pad=3)
WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
OPTIONS: dict[str, dict[str, Any]] = {
    "llama": WIDTH | {"num_key_value_heads": 2, "intermediate_size": 48},
    "gpt2": WIDTH,
    "qwen2": WIDTH | {"num_key_value_heads": 2, "intermediate_size": 48},
    "bert": WIDTH | {"intermediate_size": 48},
}
FAMILIES = tuple(OPTIONS)


def config(kind: str, task: str = "language-model", **fields: Any) -> ModelConfig:
    options = OPTIONS[kind] | ({"is_decoder": True} if (kind, task) == ("bert", "language-model") else {})
    return ModelConfig(model=f"config:{kind}", options=options | fields.pop("options", {}), **fields)


def text_model(kind: str, task: str = "language-model", seed: int = 0, **fields: Any) -> BuiltModel:
    """With random weights, for 100 tokens or 3 classes."""
    return build_model(
        config(kind, task, **fields),
        outputs=TOKENS.size if task == "language-model" else 3,
        input_shape=(12,),
        seed=seed,
        task=task,
        vocabulary=TOKENS,
    )


def packed(rows: int = 2) -> dict[str, Tensor]:
    """Rows of two documents, of 5 and 7 tokens."""
    ids = torch.randint(4, TOKENS.size, (rows, 12), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "position_ids": torch.tensor([[*range(5), *range(7)]] * rows)}


def padded() -> dict[str, Tensor]:
    """Two rows of 12 and 8 tokens, for an encoder."""
    ids = packed()["input_ids"]
    mask = torch.ones_like(ids)
    ids[1, 8:], mask[1, 8:] = TOKENS.pad or 0, 0
    return {"input_ids": ids, "attention_mask": mask}

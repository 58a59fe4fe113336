"""Text that a causal model of transformers writes after prompts of token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tutelage.engine.philox import Counter
from tutelage.engine.rng import derive_seed
from tutelage.engine.taps import Tapped
from tutelage.engine.tracing import quiet
from tutelage.recipe.generation import GenerationConfig


class GenerationError(ValueError):
    """A model that writes no text, or prompts that it cannot go on from."""


@dataclass(frozen=True)
class Prompt:
    """Token ids to go on from. The id tells it from the job's other prompts, and with the seed decides on draws."""

    id: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Generation:
    """What was written after a prompt.

    Attributes:
        prompt: its id.
        tokens: without the prompt's; the stop token is the last one where the text ended.
        ended: it came to a stop token; else it was cut at ``max_new_tokens``.
    """

    prompt: int
    tokens: tuple[int, ...]
    ended: bool


def batches(prompts: Sequence[Prompt], size: int) -> list[list[Prompt]]:
    """Prompts that are gone on from together: of similar length, in an order that depends on them alone."""
    ordered = sorted(prompts, key=lambda prompt: (len(prompt.tokens), prompt.id))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def generate(
    held: Tapped, prompts: Sequence[Prompt], options: GenerationConfig, seed: int
) -> list[Generation]:
    """What the model writes, one text a prompt, in their order.

    Each token is drawn by a number that is a function of (seed, prompt id, place) alone, so that batch size, ranks and
    the other prompts do not change a text, but for the rounding of products of other shapes; the same prompts and
    options give the same bits. Settings that come with the model (temperatures, penalties) do not count, its stop
    tokens do. The model runs in eval mode, without gradients and with its cache, and is left as it was.

    Args:
        held: its head's plan says how many tokens there are: rows beyond pad the vocabulary and are never written.

    Raises:
        GenerationError: see `check_prompts`.
    """
    check_prompts(held, prompts, options.max_new_tokens)
    found: dict[int, Generation] = {}
    for batch in batches(prompts, options.batch_size):
        found |= {answer.prompt: answer for answer in _written(held, batch, options, seed)}
    return [found[prompt.id] for prompt in prompts]


def check_prompts(held: Tapped, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
    """Raises:
    GenerationError: the model has no `generate`; two prompts of one id, an empty one, or one that leaves no room.
    """
    model: Any = held.model
    if not hasattr(model, "generate"):
        raise GenerationError(
            f"{type(model).__name__} writes no text: it has no `generate`; take a causal model of transformers"
        )
    if len({prompt.id for prompt in prompts}) < len(prompts):
        raise GenerationError("two prompts have one id; each needs its own")
    empty = next((prompt.id for prompt in prompts if not prompt.tokens), None)
    if empty is not None:
        raise GenerationError(f"prompt {empty} is empty; give it one token at least")
    room = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = max((len(prompt.tokens) for prompt in prompts), default=0)
    if room is not None and longest + max_new_tokens > room:
        raise GenerationError(
            f"a prompt of {longest} tokens and max_new_tokens {max_new_tokens} are more than the {room} positions of "
            f"{type(model).__name__}; lower max_new_tokens, or give shorter prompts"
        )


def greedy_tokens(
    held: Tapped, tokens: Sequence[int], max_new_tokens: int, drafts: Tapped | None = None
) -> list[int]:
    """The likeliest tokens after one prompt. ``drafts``: a model of equally many outputs that drafts them, by
    transformers' assisted generation; they stay the same but for rounding."""
    options = GenerationConfig(max_new_tokens=max_new_tokens)
    ids = torch.tensor([tokens], device=_device(held))
    more: dict[str, Any] = {}
    with _settled(held, options), quiet(held):
        if drafts is None:
            written = _call(held, ids, torch.ones_like(ids), more)
        else:
            with _settled(drafts, options), quiet(drafts):
                written = _call(held, ids, torch.ones_like(ids), {"assistant_model": drafts.model})
    return [int(token) for token in written[0, ids.shape[1] :]]


def _written(held: Tapped, batch: list[Prompt], options: GenerationConfig, seed: int) -> list[Generation]:
    width = max(len(prompt.tokens) for prompt in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.int64)
    for row, prompt in enumerate(batch):
        ids[row, width - len(prompt.tokens) :] = torch.tensor(prompt.tokens)
    first = torch.tensor([width - len(prompt.tokens) for prompt in batch])
    mask = (torch.arange(width) >= first[:, None]).long()
    device = _device(held)
    drawn = [_Draw.of(batch, options, seed, width, device)] if options.do_sample else []
    with _settled(held, options) as settings, quiet(held):
        written = _call(held, ids.to(device), mask.to(device), {}, drawn)[:, width:].tolist()
    stops = set(_listed(settings.eos_token_id))
    return [_cut(prompt.id, row, stops) for prompt, row in zip(batch, written, strict=True)]


def _call(held: Tapped, ids: Tensor, mask: Tensor, more: dict[str, Any], drawn: Sequence[Any] = ()) -> Tensor:
    from transformers import LogitsProcessorList

    model: Any = held.model
    processors = LogitsProcessorList([_Tokens(held.head.outputs)] if held.head is not None else [])
    processors.extend(drawn)
    written: Tensor = model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=model.generation_config,
        logits_processor=processors,
        **more,
    )
    return written


def _cut(prompt: int, tokens: list[int], stops: set[int]) -> Generation:
    """Up to the first stop token; what follows it in a batch only fills the row up."""
    end = next((place for place, token in enumerate(tokens) if token in stops), None)
    return Generation(prompt, tuple(tokens if end is None else tokens[: end + 1]), end is not None)


@contextmanager
def _settled(held: Tapped, options: GenerationConfig) -> Iterator[Any]:
    """The model with generation settings that are these options and its own stop tokens alone. transformers fills what
    is not set from the model's own settings, so these take their place meanwhile."""
    from transformers import GenerationConfig as Settings

    model: Any = held.model
    own = model.generation_config
    stops = _listed(own.eos_token_id)
    model.generation_config = Settings(
        max_new_tokens=options.max_new_tokens,
        num_beams=options.beams,
        do_sample=False,  # what is drawn is drawn by `_Draw`
        use_cache=True,
        eos_token_id=stops or None,
        # Ended rows are filled up with it. A padding token of its own would be masked where a text holds it.
        pad_token_id=stops[0] if stops else None,
    )
    try:
        yield model.generation_config
    finally:
        model.generation_config = own


class _Tokens:
    """Leaves the tokeniser's tokens alone in scores ``[rows, outputs]``, as log-probabilities, which beams add up."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        if scores.shape[-1] == self.tokens:
            return scores
        padding = torch.arange(scores.shape[-1], device=scores.device) >= self.tokens
        return scores.masked_fill(padding, -torch.inf).log_softmax(-1)


class _Draw:
    """Draws each row's token by a number of its own and leaves that one alone, so that greedy search takes it.

    transformers' own sampling draws all rows from one generator: what a row gets would depend on the others.
    """

    def __init__(self, numbers: Tensor, start: int, options: GenerationConfig) -> None:
        from transformers import TopPLogitsWarper

        self.numbers, self.start, self.temperature = numbers, start, options.temperature
        self.narrow = TopPLogitsWarper(options.top_p) if options.top_p < 1 else None

    @classmethod
    def of(
        cls,
        batch: Sequence[Prompt],
        options: GenerationConfig,
        seed: int,
        start: int,
        device: torch.device,
    ) -> _Draw:
        """For prompts that end at the place ``start``."""
        index = np.array([prompt.id for prompt in batch], dtype=np.int64)
        counter = Counter(index, np.zeros_like(index), derive_seed(seed, "text"))
        numbers = torch.from_numpy(counter.uniform(options.max_new_tokens))
        return cls(numbers.to(device), start, options)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        # Below the row's largest, in float64: divided by however small a temperature, nothing becomes +inf or NaN.
        sharp = (scores - scores.amax(-1, keepdim=True)).double() / self.temperature
        if self.narrow is not None:
            sharp = self.narrow(ids, sharp)
        mass = sharp.softmax(-1).cumsum(-1)
        wanted = self.numbers[:, ids.shape[1] - self.start, None] * mass[:, -1:]
        chosen = torch.searchsorted(mass, wanted, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


def _listed(ids: Any) -> list[int]:
    return [] if ids is None else [int(each) for each in (ids if isinstance(ids, list | tuple) else [ids])]


def _device(held: Tapped) -> torch.device:
    return next(held.parameters()).device

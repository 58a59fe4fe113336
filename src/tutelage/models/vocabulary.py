"""A model's vocabulary and the ids it names, held against those of a tokeniser."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from tutelage.models.names import ModelError
from tutelage.recipe.schema import ModelConfig

PAD_TO = 64
"""Rows of a new vocabulary are a multiple of so many: products with the head are fastest then."""
_NAMES = ("bos", "eos", "pad")


class Vocabulary(NamedTuple):
    """What a model must know of a tokeniser.

    Attributes:
        size: how many tokens it has.
        bos, eos, pad: ids of the tokens that begin and end a document and fill a row; none: it has no such token.
    """

    size: int
    bos: int | None = None
    eos: int | None = None
    pad: int | None = None


def text_of(settings: Any) -> Any:
    """The part of a configuration of transformers that is about text; itself where it has no parts."""
    return settings.get_text_config(decoder=True)


def fit_vocabulary(config: ModelConfig, settings: Any, vocabulary: Vocabulary | None) -> None:
    """Size the vocabulary of a new model (as its options say, else the tokens in whole steps of 64), and name the
    tokeniser's ids.

    Raises:
        ModelError: there are fewer rows than tokens.
    """
    new, text = config.weights is None, text_of(settings)
    if vocabulary is not None:
        if new and "vocab_size" not in config.options:
            text.vocab_size = -(-vocabulary.size // PAD_TO) * PAD_TO
        if text.vocab_size < vocabulary.size:
            advice = "leave options.vocab_size out" if new else "take the tokeniser of its weights"
            raise ModelError(
                f"{config.model} has a vocabulary of {text.vocab_size}, the tokeniser has {vocabulary.size} tokens; "
                f"{advice}"
            )
    _name_ids(settings, vocabulary, new=new)


def _name_ids(settings: Any, vocabulary: Vocabulary | None, *, new: bool) -> None:
    """Let a configuration name the tokeniser's ids. An id that it lists beside others stays (chat models end at several
    tokens). Trained weights keep an id that the tokeniser does not name; a new model keeps none, nor one beyond its
    vocabulary."""
    text = text_of(settings)
    for holder in {id(part): part for part in (settings, text)}.values():
        _set(holder, vocabulary, new)
        for field in (f"{name}_token_id" for name in _NAMES) if new else ():
            own = getattr(holder, field, None)
            if isinstance(own, int) and own >= text.vocab_size:
                setattr(holder, field, None)


def settle(module: Any, vocabulary: Vocabulary | None, *, new: bool) -> None:
    """A causal model's last touches: its configuration and its generation name the tokeniser's ids, padding is a token
    like others.

    Tokenisers often pad with the token that ends a document. An embedding that is told of a padding token never learns
    that row, and here nothing is padded with tokens that count.
    """
    embedding = module.get_input_embeddings()
    if isinstance(embedding, nn.Embedding):
        embedding.padding_idx = None
    _name_ids(module.config, vocabulary, new=new)
    if module.can_generate():
        _set(module.generation_config, vocabulary, new)


def _set(holder: Any, vocabulary: Vocabulary | None, new: bool) -> None:
    for name in _NAMES if vocabulary is not None else ():
        field, wanted = f"{name}_token_id", getattr(vocabulary, name)
        own = getattr(holder, field, None)
        listed = own if isinstance(own, list | tuple) else (own,)
        if wanted not in listed and (wanted is not None or new):
            setattr(holder, field, wanted)

"""Tokenisers: from the hub or a folder, or trained on the spot; and whether two give the same ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tutelage.data.source import DataError

END_OF_TEXT = "<|endoftext|>"
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_CHUNK = 1000
"""Texts tokenised at once: ids are Python numbers until they are put into an array."""
_SHOWN = 3


class OwnTokenizer(NamedTuple):
    """The tokeniser that comes with a model: hub name or folder, and what the recipe says of that place."""

    place: str
    revision: str | None = None
    trust_remote_code: bool = False


class Tokenizer:
    """A fast tokeniser of transformers.

    Attributes:
        fast: the tokeniser itself.
        place: the hub name or folder that it came from; None: it was trained here.
    """

    def __init__(self, fast: Any, place: str | None = None) -> None:
        self.fast, self.place = fast, place

    @cached_property
    def tokens(self) -> tuple[str | None, ...]:
        """The string of every id, added tokens included; None for an id that none has."""
        ids = self.fast.get_vocab()
        strings: list[str | None] = [None] * (max(ids.values()) + 1)
        for token, number in ids.items():
            strings[number] = token
        return tuple(strings)

    @property
    def size(self) -> int:
        """One more than the largest id: as many outputs a model of it has."""
        return len(self.tokens)

    @property
    def eos_id(self) -> int:
        """Id of the end-of-text token.

        Raises:
            DataError: there is none.
        """
        found = self.fast.eos_token_id
        if found is None:
            raise DataError(
                f"the tokeniser {self.place or 'trained here'} has no end-of-text token (eos_token), which ends every "
                "document; set it in its tokenizer_config.json"
            )
        return int(found)

    @property
    def pad_id(self) -> int:
        """Id that fills rows up; the end-of-text token's where there is no other."""
        found = self.fast.pad_token_id
        return self.eos_id if found is None else int(found)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of what decides on ids: vocabulary, merges, normaliser, splitting, added tokens. The chat template is
        no part of it."""
        whole = json.loads(self.fast.backend_tokenizer.to_str())
        parts = {name: value for name, value in whole.items() if name not in ("truncation", "padding")}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def encode(self, texts: Sequence[str], *, special: bool = True) -> list[NDArray[np.int32]]:
        """Ids of each text; ``special``: with the tokens that the tokeniser puts around a text."""
        found: list[NDArray[np.int32]] = []
        for start in range(0, len(texts), _CHUNK):
            ids = self.fast(
                list(texts[start : start + _CHUNK]),
                add_special_tokens=special,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,  # a text longer than a model takes is cut into rows here
            )["input_ids"]
            found += [np.asarray(row, dtype=np.int32) for row in ids]
        return found

    def encode_marked(
        self, texts: Sequence[str], spans: Sequence[Sequence[tuple[int, int]]]
    ) -> tuple[list[NDArray[np.int32]], list[NDArray[np.bool_]]]:
        """Ids of each text as it stands, and which of its tokens touch one of its spans of characters
        (first, one behind the last)."""
        ids: list[NDArray[np.int32]] = []
        marked: list[NDArray[np.bool_]] = []
        for start in range(0, len(texts), _CHUNK):
            found = self.fast(
                list(texts[start : start + _CHUNK]),
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                return_offsets_mapping=True,
                verbose=False,
            )
            ids += [np.asarray(row, dtype=np.int32) for row in found["input_ids"]]
            marked += [
                _touches(np.asarray(places, dtype=np.int64).reshape(-1, 2), wanted)
                for places, wanted in zip(found["offset_mapping"], spans[start : start + _CHUNK], strict=True)
            ]
        return ids, marked

    def encode_inputs(
        self, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int
    ) -> dict[str, list[NDArray[np.int32]]]:
        """What an encoder reads of each text, or pair of texts: ``input_ids``, and ``token_type_ids`` where the
        tokeniser makes them. What is longer than ``max_length`` is cut off, special tokens stay."""
        found: dict[str, list[NDArray[np.int32]]] = {}
        for start in range(0, len(texts), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            made = self.fast(
                list(texts[chunk]),
                None if pairs is None else list(pairs[chunk]),
                truncation=True,
                max_length=max_length,
                return_attention_mask=False,
            )
            for name in made:
                found.setdefault(name, []).extend(np.asarray(row, dtype=np.int32) for row in made[name])
        return found

    def encode_words(
        self, words: Sequence[Sequence[str]], max_length: int
    ) -> tuple[dict[str, list[NDArray[np.int32]]], list[NDArray[np.int64]]]:
        """As `encode_inputs`, of texts that are cut into words; and the word of which each token is the first piece,
        -1 for other tokens."""
        found: dict[str, list[NDArray[np.int32]]] = {}
        first: list[NDArray[np.int64]] = []
        for start in range(0, len(words), _CHUNK):
            made = self.fast(
                [self._spaced(row) for row in words[start : start + _CHUNK]],
                is_split_into_words=True,
                truncation=True,
                max_length=max_length,
                return_attention_mask=False,
            )
            for name in made:
                found.setdefault(name, []).extend(np.asarray(row, dtype=np.int32) for row in made[name])
            first += [_first_pieces(made.word_ids(row)) for row in range(len(made["input_ids"]))]
        return found, first

    def _spaced(self, words: Sequence[str]) -> list[str]:
        """Words with a space before all but the first, where a space is part of the tokens' strings and the tokeniser
        puts none."""
        return [words[0], *(f" {word}" for word in words[1:])] if self._keeps_spaces else list(words)

    @cached_property
    def _keeps_spaces(self) -> bool:
        splitter = json.loads(self.fast.backend_tokenizer.to_str())["pre_tokenizer"] or {}
        parts = splitter.get("pretokenizers", [splitter])
        return any(part["type"] == "ByteLevel" and not part["add_prefix_space"] for part in parts if part)

    def decode(self, ids: Sequence[int], *, special: bool = True) -> str:
        """The text of some ids; ``special``: special tokens are shown."""
        text: str = self.fast.decode(list(ids), skip_special_tokens=not special)
        return text

    def save(self, folder: Path) -> None:
        """Write it so that `load_tokenizer` and transformers read it."""
        self.fast.save_pretrained(str(folder))


def load_tokenizer(place: str, revision: str | None = None, trust_remote_code: bool = False) -> Tokenizer:
    """The tokeniser of a local folder, or of a name on the hub.

    Raises:
        DataError: no such folder or name, no tokeniser there, or one without the fast form.
    """
    transformers = _transformers()
    path = Path(place).expanduser()
    if path.is_dir():
        if not any((path / name).is_file() for name in _FILES):
            raise DataError(
                f"the folder {place!r} holds no tokeniser: there is none of {', '.join(_FILES)}. "
                "Save one there with its model, or set data.tokenizer"
            )
    elif path.exists() or path.is_absolute() or place.startswith((".", "~")):
        raise DataError(f"tokeniser {place!r}: there is no such folder; give a folder or a name on the hub")
    try:
        fast = transformers.AutoTokenizer.from_pretrained(
            str(path) if path.is_dir() else place, revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # files may be broken in any way, and each parser has errors of its own
        reason = str(error).strip().splitlines() or [repr(error)]
        raise DataError(f"the tokeniser {place!r} cannot be had: {reason[0]}") from error
    if not getattr(fast, "is_fast", False):
        raise DataError(
            f"the tokeniser {place!r} ({type(fast).__name__}) has no fast form; it needs a tokenizer.json, which "
            "transformers' convert_slow_tokenizer writes"
        )
    return Tokenizer(fast, place)


def train_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """A byte-level BPE of ``size`` tokens with an end-of-text token (id 0), which fills rows up too. The same texts and
    size give the same one.

    Raises:
        DataError: texts too small or too uniform for so many tokens.
    """
    transformers = _transformers()
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    found = backend.get_vocab_size()
    if found != size:
        raise DataError(
            f"the training rows' text gives {found} tokens, not the {size} of data.tokenizer.train; "
            f"set it to at most {found}, or give more text"
        )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )
    return Tokenizer(fast)


def vocabulary_difference(ours: Tokenizer, theirs: Tokenizer) -> str | None:
    """How two vocabularies differ, by size and by the strings of their ids; None where they are equal."""
    parts = []
    if ours.size != theirs.size:
        parts.append(f"{ours.size} tokens against {theirs.size}")
    pairs = enumerate(zip(ours.tokens, theirs.tokens, strict=False))
    unequal = [(number, one, other) for number, (one, other) in pairs if one != other]
    if unequal:
        shown = ", ".join(
            f"id {number} is {one!r} against {other!r}" for number, one, other in unequal[:_SHOWN]
        )
        more = f" and {len(unequal) - _SHOWN} more" if len(unequal) > _SHOWN else ""
        parts.append(f"{shown}{more}")
    elif parts:
        longer, whose = (ours, "ours") if ours.size > theirs.size else (theirs, "theirs")
        start = min(ours.size, theirs.size)
        shown = ", ".join(repr(token) for token in longer.tokens[start : start + _SHOWN])
        parts.append(f"from id {start} on only {whose}: {shown}")
    return "; ".join(parts) or None


def _touches(places: NDArray[np.int64], spans: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    """Which of the tokens at ``places`` ``[tokens, 2]`` share a character with a span."""
    found = np.zeros(len(places), dtype=np.bool_)
    for first, end in spans:
        found |= (places[:, 1] > first) & (places[:, 0] < end)
    return found


def _first_pieces(words: Sequence[int | None]) -> NDArray[np.int64]:
    """The word of each token ``[tokens]``, -1 at special tokens and further pieces of a word."""
    numbers = np.asarray([-1 if word is None else word for word in words], dtype=np.int64)
    return np.where(numbers != np.concatenate([[-1], numbers[:-1]]), numbers, -1)


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError:
        raise DataError("text needs transformers: pip install 'tutelage[llm]'") from None
    return transformers  # type: ignore[no-any-return]

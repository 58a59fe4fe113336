"""Documents as one run of tokens: what texts and chats become, and what is packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Documents:
    """Tokens of documents, one after the other.

    Attributes:
        tokens: ``[tokens]`` int32.
        offsets: ``[documents + 1]``: document d is ``tokens[offsets[d]:offsets[d + 1]]``.
        counted: ``[tokens]`` bool: tokens that are learnt; None: all of them.
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    counted: NDArray[np.bool_] | None = None

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    @property
    def learnt(self) -> NDArray[np.int64] | None:
        """Where in each document the first token stands that counts and follows another one ``[documents]``; its length
        where there is none. None where all tokens count."""
        if self.counted is None:
            return None
        follows = np.ones(len(self.tokens) + 1, dtype=np.bool_)
        follows[self.offsets[:-1]] = False
        places = np.append(np.flatnonzero(self.counted & follows[:-1]), len(self.tokens))
        first = places[np.searchsorted(places, self.offsets[:-1])]
        return np.asarray(np.minimum(first, self.offsets[1:]) - self.offsets[:-1], dtype=np.int64)

    def teach(self, max_length: int) -> bool:
        """Whether a token that is learnt stands among the first ``max_length`` of any document."""
        learnt = self.learnt
        if learnt is None:
            return bool(len(self.tokens))
        return bool((learnt < np.minimum(self.lengths, max_length)).any())

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def of(
        cls, tokens: Sequence[NDArray[np.int32]], counted: Sequence[NDArray[np.bool_]] | None = None
    ) -> Documents:
        """From the tokens of each document, and which of them count."""
        offsets = np.cumsum([0, *(len(document) for document in tokens)], dtype=np.int64)
        empty = np.empty(0, dtype=np.int32)
        return cls(
            np.concatenate([empty, *tokens]),
            offsets,
            None if counted is None else np.concatenate([empty.astype(np.bool_), *counted]),
        )

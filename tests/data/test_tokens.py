"""TokenSource: what a batch of packed rows holds, and that a model reads packed documents as it reads them alone."""

from __future__ import annotations

import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support import fetched
from tutelage.data import DataError, column, row_ids, subset
from tutelage.data.documents import Documents
from tutelage.data.tokenizer import Tokenizer
from tutelage.data.tokens import TokenSource

WAYS = ("best_fit", "wrapped", "none")


def random_documents(lengths: list[int], seed: int, size: int = 600, counted: bool = True) -> Documents:
    draw = np.random.default_rng(seed)
    tokens = [draw.integers(1, size, length).astype(np.int32) for length in lengths]
    return Documents.of(tokens, [draw.random(length) < 0.6 for length in lengths] if counted else None)


def expected_row(source: TokenSource, documents: Documents, row: int, width: int) -> list[list[int]]:
    """ids, positions and targets of a row, one token at a time."""
    layout = source.layout
    ids: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    for piece in range(layout.first[row], layout.first[row + 1]):
        begin, end = documents.offsets[layout.document[piece] :][:2]
        for place in range(layout.length[piece]):
            here = begin + layout.start[piece] + place
            cut = not source.packed or documents.counted is not None
            last = here + 1 == end or (cut and place == layout.length[piece] - 1)
            counts = not last and (documents.counted is None or documents.counted[here + 1])
            ids.append(int(documents.tokens[here]))
            positions.append(place)
            targets.append(int(documents.tokens[here + 1]) if counts else -100)
    rest = width - len(ids)
    return [ids + [source.pad_id] * rest, positions + list(range(rest)), targets + [-100] * rest]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any),
    most=st.integers(2, 16),
    how=st.sampled_from(WAYS),
    counted=st.booleans(),
    draw=st.randoms(),
)
def test_a_batch_holds_what_a_walk_over_the_tokens_finds(
    tokenizer: Tokenizer, lengths: list[int], most: int, how: str, counted: bool, draw: random.Random
) -> None:
    documents = random_documents(lengths, 0, counted=counted)
    learnt = documents.learnt
    if learnt is not None and not ((learnt < documents.lengths) & (learnt < most)).any():
        with pytest.raises(DataError, match=r"nothing counts|begins after"):
            TokenSource(documents, tokenizer, max_length=most, packing=how)
        return
    source = TokenSource(documents, tokenizer, max_length=most, packing=how, first_id=7)
    chosen = [draw.randrange(len(source)) for _ in range(3)]
    batch = fetched(source, chosen)
    width = most if source.packed else int(source.row_lengths[chosen].max())
    rows = [expected_row(source, documents, row, width) for row in chosen]
    assert batch["input_ids"].tolist() == [row[0] for row in rows]
    assert batch["position_ids"].tolist() == [row[1] for row in rows]
    assert batch["target"].tolist() == [row[2] for row in rows]
    assert torch.equal(batch["mask"], batch["target"] != -100)
    assert batch["index"].tolist() == [row + 7 for row in chosen]
    assert batch["input_ids"].dtype == batch["position_ids"].dtype == torch.int64


@pytest.mark.parametrize("how", WAYS)
def test_an_answer_is_learnt_after_its_prompt_or_not_at_all(tokenizer: Tokenizer, how: str) -> None:
    """Prompt and answer of each document; the first is 1, 2, 3, …, the second 101, 102, …."""
    sizes = [(3, 2), (6, 10), (20, 4), (9, 0), (10, 1), (2, 30)]
    documents = Documents.of(
        [np.concatenate([np.arange(1, p + 1), np.arange(101, 101 + a)]).astype(np.int32) for p, a in sizes],
        [np.arange(p + a) >= p for p, a in sizes],
    )
    source = TokenSource(documents, tokenizer, max_length=12, packing=how)
    batch = fetched(source, range(len(source)))
    assert batch["mask"].any(1).all()
    begins = batch["input_ids"][batch["position_ids"] == 0]
    assert set(begins.tolist()) <= {1, source.pad_id}
    for ids, positions, target in zip(
        batch["input_ids"], batch["position_ids"], batch["target"], strict=True
    ):
        for place in (target > -1).nonzero().flatten().tolist():
            before = ids[place - int(positions[place]) : place + 1].tolist()
            prompt = [token for token in before if token < 100]
            assert [*before, int(target[place])] == prompt + list(range(101, 102 + len(before) - len(prompt)))
            assert (len(prompt), 0) not in sizes
    assert sorted(batch["target"][batch["mask"]].tolist()) == sorted(
        101 + number for number_of in (2, 6, 1, 10) for number in range(number_of)
    )
    assert source.lost == 4 + 24 + 20


@pytest.mark.parametrize("how", ["best_fit", "wrapped"])
def test_every_token_but_a_documents_first_is_a_target_once(tokenizer: Tokenizer, how: str) -> None:
    documents = random_documents([5, 40, 1, 17, 64], 1, counted=False)
    source = TokenSource(documents, tokenizer, max_length=16, packing=how)
    batch = fetched(source, range(len(source)))
    learnt = np.sort(batch["target"][batch["mask"]].numpy())
    wanted = np.delete(documents.tokens, documents.offsets[:-1])
    assert learnt.tolist() == np.sort(wanted).tolist()
    assert source.tokens == len(documents.tokens)


def test_documents_of_unequal_columns_share_no_row(tokenizer: Tokenizer) -> None:
    documents = random_documents([4] * 20, 2)
    domain, level = torch.arange(20) % 2, torch.tensor([0.5, 1.5] * 5 + [2.5] * 10)
    source = TokenSource(
        documents,
        tokenizer,
        max_length=16,
        packing="best_fit",
        columns={"domain": domain, "level": level},
        names={"domain": ("web", "code")},
    )
    batch = fetched(source, range(len(source)))
    layout = source.layout
    for row in range(len(source)):
        inside = layout.document[layout.first[row] : layout.first[row + 1]]
        assert set(domain[inside].tolist()) == {int(batch["domain"][row])}
        assert set(level[inside].tolist()) == {float(batch["level"][row])}
    assert source.names == {"domain": ("web", "code")}
    assert {"domain", "level"} < source.fields
    for each in (source, source.keep(np.array([3, 0])), subset(source, [4, 1])):
        assert torch.equal(column(each, "level"), fetched(each, range(len(each)))["level"])


def test_a_row_gives_back_the_tokens_of_each_document(tokenizer: Tokenizer) -> None:
    documents = random_documents([5, 30, 3, 7], 5, counted=False)
    source = TokenSource(documents, tokenizer, max_length=16, packing="best_fit").keep(np.array([2, 0, 1]))
    for row in range(len(source)):
        ids = fetched(source, [row])["input_ids"][0]
        pieces = source.tokens_of(row)
        assert np.concatenate(pieces).tolist() == ids[: int(source.row_lengths[row])].tolist()
        assert len(pieces) == int(
            (fetched(source, [row])["position_ids"][0][: sum(map(len, pieces))] == 0).sum()
        )


def test_kept_rows_keep_their_ids_and_what_they_stand_for(tokenizer: Tokenizer) -> None:
    source = TokenSource(random_documents([9] * 30, 3), tokenizer, max_length=20, packing="best_fit")
    kept = source.keep(np.array([7, 2]))
    assert len(kept) == 2
    assert kept.ids.tolist() == [7, 2]
    assert torch.equal(fetched(kept, [0])["input_ids"], fetched(source, [7])["input_ids"])
    assert kept.packing_fingerprint == source.packing_fingerprint
    assert kept.fingerprint != source.fingerprint
    assert kept.tokens == 36
    assert subset(kept, [1]).packing_fingerprint == source.packing_fingerprint
    assert row_ids(subset(kept, [1])).tolist() == [2]


def test_the_fingerprint_tells_tokens_packing_and_what_counts_apart(tokenizer: Tokenizer) -> None:
    def marks(documents: Documents, most: int = 16, how: str = "best_fit", **more: Any) -> str | None:
        return TokenSource(documents, tokenizer, max_length=most, packing=how, **more).packing_fingerprint

    one = random_documents([9, 8, 7], 4)
    other = random_documents([9, 8, 7], 5)
    uncounted = Documents(one.tokens, one.offsets)
    found = [marks(one), marks(other), marks(uncounted), marks(one, 17), marks(one, how="wrapped")]
    found.append(marks(one, columns={"domain": torch.arange(3)}))
    assert len(set(found)) == len(found)
    assert marks(one) == marks(random_documents([9, 8, 7], 4))


def test_loader_processes_get_a_copy(tokenizer: Tokenizer) -> None:
    source = TokenSource(random_documents([9, 8, 7], 4), tokenizer, max_length=16, packing="best_fit")
    copied = pickle.loads(pickle.dumps(source))
    ids = [fetched(each, [0, 1])["input_ids"] for each in (copied, source)]
    assert torch.equal(*ids)


def causal(kind: str, attention: str) -> Any:
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 600, "use_cache": False}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **sizes)
    else:
        config = transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            **sizes,
        )
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@torch.no_grad()
def test_a_packed_document_has_the_logits_that_it_has_alone(
    tokenizer: Tokenizer, kind: str, attention: str
) -> None:
    documents = random_documents([1, 1, 5, 13, 21, 30, 2, 40, 1], 6)
    source = TokenSource(documents, tokenizer, max_length=48, packing="best_fit")
    layout = source.layout
    assert len(source) < len(documents) - 2
    model = causal(kind, attention)
    batch = fetched(source, range(len(source)))
    packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    for row in range(len(source)):
        place = 0
        for piece in range(layout.first[row], layout.first[row + 1]):
            begin, length = documents.offsets[layout.document[piece]], layout.length[piece]
            ids = torch.from_numpy(documents.tokens[begin : begin + length]).long()[None]
            alone = model(input_ids=ids).logits[0]
            torch.testing.assert_close(packed[row, place : place + length], alone, rtol=0, atol=1e-5)
            place += length


@pytest.mark.parametrize("packing", ["best_fit", "wrapped", "none"])
@pytest.mark.parametrize("counting", [False, True])
def test_teaching_rows_are_those_with_a_target(tokenizer: Tokenizer, packing: str, counting: bool) -> None:
    """Lengths that leave rows of a single token behind: a document's first one alone, and its last one."""
    documents = random_documents([1, 17, 33, 16, 2, 1, 1, 40, 17], 6)
    if counting:
        marks = np.random.default_rng(0).random(len(documents.tokens)) < 0.3
        documents = Documents(documents.tokens, documents.offsets, marks)
    for max_length in (2, 8, 16):
        source = TokenSource(documents, tokenizer, max_length=max_length, packing=packing)
        for rows in (source, source.keep(np.arange(len(source))[::-2])):
            expected = fetched(rows, range(len(rows)))["mask"].any(1)
            assert rows.teaching.tolist() == expected.tolist()

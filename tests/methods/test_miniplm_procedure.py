"""miniplm: what is kept, the refined corpus, resume at every stage, launches, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import tutelage.procedures.scoring as scoring
from killing import stop_after
from tutelage.data import TokenSource, row_ids, train_tokenizer
from tutelage.engine.needs import Offers, PairingError, Setting, check_pairing
from tutelage.functional import difference_sampling, difference_score
from tutelage.recipe import load_recipe
from tutelage.runs import RunResult, check, distill
from tutelage.runs.assemble import assemble
from tutelage.untrusted import FileError

SOURCES = [
    {"name": "easy", "order": 1, "share": 5, "concentration": 0.05},
    {"name": "noise", "order": 0, "share": 3, "concentration": 1000},
]
LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY = {"model": "config:llama", "options": LLAMA | {"hidden_size": 8}}


def recipe(train: dict[str, Any] | None = None, data: dict[str, Any] | None = None, **method: Any) -> Any:
    values = {
        "steps": 6,
        "batch_size": 8,
        "optimizer": {"name": "adamw", "lr": 0.01},
        "device": "cpu",
        "threads": 1,
        "checkpoint": {"every": 2},
    }
    return {
        "task": "language-model",
        "data": {
            "path": "markov",
            "markov": {"symbols": 8, "rows": 200, "sources": SOURCES},
            "columns": ["source"],
            "max_length": 12,
            "validation": 20,
            "test": 20,
        }
        | (data or {}),
        "teacher": {"model": "config:llama", "options": LLAMA},
        "student": {"model": "config:llama", "options": LLAMA},
        "method": {"name": "miniplm", "reference": TINY, "reference_steps": 4, "score_batch_size": 2}
        | method,
        "train": values | (train or {}),
        "evaluation": {"group_by": "source"},
        "output": {"report": False},
    }


def run(folder: Path | str, values: Any = None, **options: Any) -> RunResult:
    return distill(values or recipe(), folder=folder, progress=False, **options)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "student" / "model.safetensors")
    return found


def same(left: Path, right: Path) -> bool:
    return all(torch.equal(value, weights(right)[name]) for name, value in weights(left).items())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return run(tmp_path_factory.mktemp("miniplm") / "run")


@pytest.fixture(scope="module")
def corpus() -> TokenSource:
    found = assemble(load_recipe(recipe())).data.train
    assert isinstance(found, TokenSource)
    return found


def scores(folder: Path, role: str, rows: int = 160) -> torch.Tensor:
    """Mean of every row's tokens, from the shards on disk."""
    shards = [load_file(path) for path in sorted((folder / "scores" / role).glob("*.safetensors"))]
    found = torch.cat([shard["nll"] / shard["tokens"] for shard in shards])
    assert len(found) == rows
    return found


# --- what is kept


def test_the_rows_with_the_largest_differences_are_kept_in_the_corpus_order(
    finished: RunResult, corpus: TokenSource
) -> None:
    score = difference_score(scores(finished.folder, "teacher"), scores(finished.folder, "reference"))
    kept = difference_sampling(score, 0.5)
    table = pq.read_table(finished.folder / "datasets" / "refined" / "train-00000-of-00001.parquet")
    assert len(kept) == 80 == finished.result["rows_kept"]
    assert finished.result["rows_without_score"] == 0
    assert table["row"].to_pylist() == row_ids(corpus)[kept].tolist()
    assert table["score"].to_pylist() == score[kept].tolist()
    difference = torch.tensor(table["reference_nll"].to_pylist()) - torch.tensor(
        table["teacher_nll"].to_pylist()
    )
    torch.testing.assert_close(difference, score[kept].float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("score", ["reference", "teacher"])
def test_one_model_s_loss_alone_may_choose(score: str, tmp_path: Path, corpus: TokenSource) -> None:
    result = run(tmp_path / "run", recipe(score=score, ratio=0.29))
    own = scores(tmp_path / "run", score) * (1 if score == "reference" else -1)
    kept = difference_sampling(own, 0.29)
    table = pq.read_table(tmp_path / "run" / "datasets" / "refined" / "train-00000-of-00001.parquet")
    assert result.result["rows_kept"] == int(0.29 * 160)
    assert table["row"].to_pylist() == row_ids(corpus)[kept].tolist()


def test_sums_in_place_of_means_rank_long_rows_higher(tmp_path: Path) -> None:
    found = run(tmp_path / "run", recipe(normalise=False)).result["tables"]["scores"]["rows"]
    means = run(tmp_path / "means").result["tables"]["scores"]["rows"]
    tokens = 11
    for summed, mean in zip(found[1:3], means[1:3], strict=True):
        assert summed[2:] == pytest.approx([tokens * value for value in mean[2:]])


# --- what is left


def test_the_student_trains_on_the_kept_rows_without_the_teacher(finished: RunResult) -> None:
    assert (finished.result["status"], finished.result["steps"]) == ("done", 6)
    assert finished.result["epochs"] == pytest.approx(6 / 10)
    cost = {
        stage: (rows, tokens) for stage, rows, tokens, _ in finished.result["tables"]["teacher cost"]["rows"]
    }
    assert cost == {
        "scoring by teacher": (160, 160 * 11),
        "scoring by reference": (160, 160 * 11),
        "training of the student": (48, 0),
    }
    assert {"loss", "loss[source=easy]", "loss[source=noise]"} <= finished.result["test"].keys()
    assert finished.result["validation"]["loss"] > 0
    assert finished.result["teachers"]["teacher"]["test"]["loss"] > 0
    assert finished.result["datasets"] == {"refined": "datasets/refined"}


def test_tables_tell_how_scores_lie_and_what_share_of_each_source_is_kept(
    finished: RunResult, corpus: TokenSource
) -> None:
    tables = finished.result["tables"]
    rows = {row[0]: row[1:] for row in tables["scores"]["rows"]}
    assert rows["score"][0] == 160
    assert rows["score of dropped rows"][-1] <= rows["score of kept rows"][1]
    by_source = {row[1]: row[2:] for row in tables["kept by column"]["rows"]}
    assert sum(count for count, *_ in by_source.values()) == 160
    assert sum(kept for _, kept, *_ in by_source.values()) == 80
    assert all(share == kept / count for count, kept, share, _ in by_source.values())
    refined = pq.read_table(finished.folder / "datasets" / "refined" / "train-00000-of-00001.parquet")
    named = refined["source"].to_pylist()
    assert {name: named.count(name) for name in by_source} == {n: v[1] for n, v in by_source.items()}


def test_the_refined_corpus_is_the_kept_rows_text(finished: RunResult, corpus: TokenSource) -> None:
    data = assemble(load_recipe(recipe())).data
    assert data.info.tokenizer is not None
    table = pq.read_table(finished.folder / "datasets" / "refined" / "train-00000-of-00001.parquet")
    position = {row: place for place, row in enumerate(row_ids(corpus).tolist())}
    for row, text in zip(table["row"].to_pylist()[:20], table["text"].to_pylist(), strict=False):
        ids = corpus.fetch([position[row]]).inputs["input_ids"][0]  # type: ignore[index]
        assert data.info.tokenizer.encode([text])[0].tolist() == ids.tolist()


@pytest.fixture(scope="module")
def bytes_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tokeniser that was trained on other text and reads any."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([f"{a}{b}{a} {b}{c}" for a in "mnopq" for b in "aeiou" for c in "rstuv"], 300).save(
        folder
    )
    return str(folder)


def test_a_student_with_another_tokeniser_trains_on_it(
    finished: RunResult, bytes_tokenizer: str, tmp_path: Path
) -> None:
    second = recipe() | {
        "data": {
            "path": str(finished.folder / "datasets" / "refined"),
            "text": "text",
            "tokenizer": bytes_tokenizer,
            "max_length": 24,
            "columns": ["source"],
            "validation": 8,
        },
        "method": "none",
    }
    second.pop("teacher")
    result = run(tmp_path / "second", second).result
    assert result["status"] == "done"
    assert result["data"]["outputs"] == 300
    assert result["data"]["rows"]["train"] > 0


def test_several_documents_of_a_row_come_back_as_several_texts(bytes_tokenizer: str, tmp_path: Path) -> None:
    lines = [{"text": " ".join(["ab", "cd"] * (1 + n % 4)) + f" number {n}"} for n in range(60)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data: dict[str, Any] = {
        "path": str(tmp_path / "text.jsonl"),
        "markov": None,
        "text": "text",
        "tokenizer": bytes_tokenizer,
        "max_length": 64,
        "columns": [],
        "validation": 4,
        "test": 4,
    }
    values = recipe(data=data, ratio=1.0, reference_share=1.0) | {"evaluation": {}}
    values["train"]["batch_size"] = 2
    result = run(tmp_path / "run", values).result
    table = pq.read_table(tmp_path / "run" / "datasets" / "refined" / "train-00000-of-00001.parquet")
    texts = table["text"].to_pylist()
    assert len(texts) == 52 > result["data"]["rows"]["train"]
    assert set(texts) < {line["text"] for line in lines}
    assert "kept by column" not in result["tables"]


# --- the reference


def test_a_reference_may_be_a_finished_run(finished: RunResult, tmp_path: Path) -> None:
    given = run(tmp_path / "given", recipe(reference=str(finished.folder)))
    assert not (tmp_path / "given" / "stages" / "reference").exists()
    assert not torch.equal(scores(given.folder, "reference"), scores(finished.folder, "reference"))
    assert torch.equal(scores(given.folder, "teacher"), scores(finished.folder, "teacher"))


def test_left_out_it_is_one_like_the_student() -> None:
    made = assemble(load_recipe(recipe(reference=None)))
    work = made.procedure_run(None, show_progress=False)
    reference = made.method._new_reference(work)  # type: ignore[union-attr, operator]
    ours, theirs = made.student.module.state_dict(), reference.held.model.state_dict()
    assert {name: value.shape for name, value in ours.items()} == {n: v.shape for n, v in theirs.items()}
    assert not all(torch.equal(value, theirs[name]) for name, value in ours.items())
    work.close()


def test_scores_kept_elsewhere_serve_further_students(finished: RunResult, tmp_path: Path) -> None:
    kept: dict[str, Any] = {"scores": str(tmp_path / "scores"), "reference": str(finished.folder)}
    run(tmp_path / "first", recipe(**kept))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "scores").rglob("*")}
    teacher = {"teacher": {"run": str(finished.folder)}}
    other = recipe({"steps": 5}, ratio=0.25, **kept) | {"student": TINY}
    second = run(tmp_path / "second", other)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "scores").rglob("*")} == before
    assert second.result["rows_kept"] == 40
    with pytest.raises(FileError, match="scores of something else: model is"):
        run(tmp_path / "third", recipe(**kept) | teacher)
    assert not (tmp_path / "third" / "stages").exists()
    with pytest.raises(FileError, match="reference holds scores of something else: max_length is 12 there"):
        check(recipe(data={"max_length": 10}, **kept))


def test_shared_scores_need_a_reference_that_is_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set method\.reference to the folder of a finished run"):
        check(recipe(scores=str(tmp_path / "scores")))
    assert list(tmp_path.iterdir()) == []


# --- resume and launches


@pytest.mark.parametrize("step", [2, 5, 9])
def test_a_run_killed_in_training_ends_with_the_same_bits(
    step: int, finished: RunResult, tmp_path: Path
) -> None:
    """Steps 1 to 4 are the reference's, those after it the student's."""
    stop_after(step, lambda kill: run(tmp_path / "run", callbacks=[kill]))
    run(tmp_path / "run", resume=True)
    assert same(finished.folder, tmp_path / "run")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("shard", [0, 6])
def test_a_run_killed_in_scoring_goes_on_with_the_shard_it_was_at(
    shard: int, finished: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five shards a model: the teacher's, then the reference's."""
    write = scoring._Scoring.write
    written: list[int] = []

    def killing(self: Any, folder: Path, number: int) -> None:
        if len(written) == shard:
            raise Killed
        written.append(number)
        write(self, folder, number)

    monkeypatch.setattr(scoring._Scoring, "write", killing)
    with pytest.raises(Killed):
        run(tmp_path / "run")
    again: list[int] = []

    def counting(self: Any, folder: Path, number: int) -> None:
        again.append(number)
        write(self, folder, number)

    monkeypatch.setattr(scoring._Scoring, "write", counting)
    run(tmp_path / "run", resume=True)
    assert len(again) == 10 - shard
    assert same(finished.folder, tmp_path / "run")
    refined = Path("datasets/refined") / "train-00000-of-00001.parquet"
    assert pq.read_table(finished.folder / refined).equals(pq.read_table(tmp_path / "run" / refined))


def distilled(folder: str, sharding: str) -> dict[str, Any]:
    return run(folder, recipe({"sharding": sharding, "checkpoint": {}})).result


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_ranks_give_the_corpus_and_the_student_of_one(
    sharding: str, finished: RunResult, pair: Any, tmp_path: Path
) -> None:
    for result in pair.run(distilled, str(tmp_path / "two"), sharding):
        assert result["test"] == pytest.approx(finished.result["test"], rel=1e-3)
    refined = Path("datasets/refined") / "train-00000-of-00001.parquet"
    alone, two = (pq.read_table(folder / refined) for folder in (finished.folder, tmp_path / "two"))
    assert alone["text"].to_pylist() == two["text"].to_pylist()


# --- what is refused


def refused(match: str, values: Any) -> None:
    with pytest.raises(ValueError, match=match):
        check(values)


def test_what_cannot_be_refined_is_refused_before_anything_is_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(r"method.ratio is 0.001, which keeps none of 160 rows", recipe(ratio=0.001))
    refused(r"there is no folder 'nowhere'", recipe(reference="nowhere"))
    several = {"one": recipe()["teacher"], "two": recipe()["teacher"]}
    refused("scores by one teacher; this recipe has 2", recipe() | {"teacher": several})
    refused("is named `reference`", recipe() | {"teacher": {"reference": recipe()["teacher"]}})
    assert list(tmp_path.iterdir()) == []


def test_a_remainder_of_packing_has_no_score_and_is_left_out(bytes_tokenizer: str, tmp_path: Path) -> None:
    """Documents of 16 digits and an end, a token each, cut every 16: the ends fill a row in which nothing counts."""
    lines = [json.dumps({"text": f"{number * 7919:016d}"}) for number in range(20)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    data: dict[str, Any] = {
        "path": str(tmp_path / "text.jsonl"),
        "markov": None,
        "text": "text",
        "tokenizer": bytes_tokenizer,
        "max_length": 16,
        "columns": [],
        "validation": 2,
        "test": 2,
    }
    values = recipe(data=data, reference_share=1.0) | {"evaluation": {}}
    result = run(tmp_path / "run", values).result
    assert result["data"]["rows"]["train"] == 17
    assert (result["rows_without_score"], result["rows_kept"]) == (1, 8)
    assert len(scores(tmp_path / "run", "teacher", rows=16)) == 16


def test_a_stored_teacher_is_refused() -> None:
    method = assemble(load_recipe(recipe())).method
    setting = Setting("language-model", frozenset({"target", "index"}))
    reasons = check_pairing("miniplm", method.needs, {"teacher": Offers(live=False)}, setting)
    assert any("needs a live teacher" in reason for reason in reasons)


def test_a_reference_of_another_tokeniser_is_refused(finished: RunResult, tmp_path: Path) -> None:
    data = {"markov": {"symbols": 9, "rows": 200, "sources": SOURCES}}
    values = recipe(data=data, reference=str(finished.folder))
    with pytest.raises(PairingError, match="has another vocabulary than the rows' tokeniser"):
        check(values)

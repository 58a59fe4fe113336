"""ddk: how an interval is drawn, how domains are measured, when it ends, launches, resume, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from killing import stop_after
from support import Rows
from tutelage.data import DataError, column, subset
from tutelage.engine.needs import PairingError
from tutelage.engine.step import Step
from tutelage.functional import (
    ddk_initial_factor,
    ddk_loss,
    ddk_update_factor,
    domain_perplexity,
    per_instance_nll,
)
from tutelage.methods.ddk.held_out import held_out_rows, perplexities
from tutelage.methods.ddk.mixture import Mixture, rows_by_domain
from tutelage.recipe import load_recipe
from tutelage.runs import RunResult, check, distill
from tutelage.runs.assemble import assemble
from tutelage.runs.cache import cache

SOURCES = [
    {"name": "a", "order": 1, "share": 6, "concentration": 0.1},
    {"name": "b", "order": 1, "share": 3, "concentration": 0.05},
    {"name": "c", "order": 2, "share": 1, "concentration": 0.05},
]
LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def recipe(train: dict[str, Any] | None = None, data: dict[str, Any] | None = None, **method: Any) -> Any:
    markov = {"symbols": 8, "rows": 240, "tagged": True, "sources": SOURCES}
    values = {
        "steps": 6,
        "batch_size": 8,
        "optimizer": {"name": "sgd", "lr": 0.5},
        "device": "cpu",
        "threads": 1,
        "checkpoint": {"every": 1},
    }
    return {
        "task": "language-model",
        "data": {
            "path": "markov",
            "markov": markov,
            "columns": ["source"],
            "max_length": 12,
            "validation": 60,
            "test": 60,
        }
        | (data or {}),
        "teacher": {"model": "config:llama", "options": LLAMA | {"hidden_size": 32}},
        "student": {"model": "config:llama", "options": LLAMA},
        "method": {"name": "ddk", "domain": "source", "interval": 2} | method,
        "train": values | (train or {}),
        "evaluation": {"group_by": "source"},
        "output": {"report": False},
    }


def trainer(**options: Any) -> Any:
    return assemble(load_recipe(recipe(**options))).trainer(None)


def run(folder: Path | str, values: Any = None, **options: Any) -> RunResult:
    return distill(values or recipe(), folder=folder, progress=False, **options)


# --- the interval


def mixture(sizes: list[int], length: int = 40, seed: int = 0) -> Mixture:
    starts = torch.tensor([0, *sizes]).cumsum(0)
    rows = {f"d{n}": torch.arange(int(starts[n]), int(starts[n + 1])) for n in range(len(sizes))}
    return Mixture(rows, length, seed)


def taken(made: Mixture, domain: int) -> list[int]:
    """Rows of a domain in this interval, sorted."""
    own = set(made.rows[domain].tolist())
    return sorted(row for row in made.order(made.interval).tolist() if row in own)


def test_the_first_interval_is_drawn_by_the_domains_sizes() -> None:
    made = mixture([600, 300, 100], length=6000)
    assert made.factor.tolist() == pytest.approx([0.6, 0.3, 0.1])
    counts = [len(taken(made, domain)) / 6000 for domain in range(3)]
    assert counts == pytest.approx([0.6, 0.3, 0.1], abs=0.03)


def test_every_row_of_a_domain_is_read_before_any_is_read_again() -> None:
    made = mixture([30, 7], length=40)
    made.factor = torch.tensor([0.5, 0.5], dtype=torch.float64)
    seen: list[int] = []
    for _ in range(3):
        seen += taken(made, 1)
        made.advance(made.factor)
    counts = torch.tensor(seen).bincount(minlength=37)[30:]
    assert int(counts.max() - counts.min()) <= 1
    assert int(counts.sum()) == int(made.read[1]) > 40


def test_rows_are_shuffled_within_an_interval_and_drawn_anew_in_the_next() -> None:
    made = mixture([200], length=50)
    first = made.order(0).tolist()
    assert first != made.rows[0][:50].tolist()
    assert sorted(first) == sorted(made.rows[0][:50].tolist())
    made.advance(made.factor)
    assert sorted(made.order(1).tolist()) == sorted(made.rows[0][50:100].tolist())


def test_a_domain_without_a_share_is_not_read() -> None:
    made = mixture([50, 50])
    made.advance(torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert taken(made, 1) == []


def test_its_state_is_plain_json_and_gives_the_same_interval() -> None:
    made = mixture([30, 20, 5])
    made.advance(torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64))
    made.advance(torch.tensor([1 / 3, 1 / 7, 1 - 1 / 3 - 1 / 7], dtype=torch.float64))
    again = mixture([30, 20, 5])
    again.load_state_dict(json.loads(json.dumps(made.state_dict())))
    assert torch.equal(again.order(2), made.order(2))
    assert torch.equal(again.read_after(17), made.read_after(17))
    with pytest.raises(ValueError, match="stands at interval 2; 1 was asked for"):
        again.order(1)


def test_what_was_read_counts_a_part_of_an_interval() -> None:
    made = mixture([30, 10])
    order = made.order(0)[:13]
    assert made.read_after(13).tolist() == [int((order < 30).sum()), int((order >= 30).sum())]


# --- domains and their perplexity


def test_domains_are_named_by_their_column() -> None:
    source = trainer().source
    found = rows_by_domain(source, "source")
    assert list(found) == ["a", "b", "c"]
    codes = column(source, "source")
    assert all((codes[rows] == number).all() for number, rows in enumerate(found.values()))
    numbers = Rows(torch.zeros(4, 1), torch.zeros(4), shard=torch.tensor([5.0, 2.0, 5.0, 2.5]))
    assert {name: rows.tolist() for name, rows in rows_by_domain(numbers, "shard").items()} == {
        "2": [1], "2.5": [3], "5": [0, 2],
    }  # fmt: skip
    numbers.columns["shard"][1] = torch.nan
    with pytest.raises(ValueError, match="one domain a row"):
        rows_by_domain(numbers, "shard")
    with pytest.raises(DataError, match="no column 'topic'; name it in"):
        rows_by_domain(numbers, "topic")


def test_perplexity_is_over_all_tokens_of_a_domain_and_never_of_more_rows_than_asked() -> None:
    made = trainer()
    teacher = made.setup.teachers["teacher"]
    rows = made.setup.data.rows("validation")
    parts = held_out_rows(rows, "source", ["a", "b", "c"], 7)
    assert all(0 < len(part) <= 7 for part in parts.values())
    found = perplexities("teacher", teacher.outputs, parts)
    nll, domain = [], []
    for number, part in enumerate(parts.values()):
        batch: Any = part.source.fetch(range(len(part)))
        logits = teacher.outputs(batch).logits.double()
        each = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.target.flatten(), reduction="none", ignore_index=-100
        )
        kept = batch.mask.flatten()
        nll.append(each[kept])
        domain.append(torch.full((int(kept.sum()),), number))
    wanted = domain_perplexity(torch.cat(nll), torch.cat(domain), None, 3)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


def measured() -> list[float]:
    made = trainer()
    parts = held_out_rows(made.setup.data.rows("validation"), "source", ["a", "b", "c"], 5)
    found: list[float] = perplexities("teacher", made.setup.teachers["teacher"].outputs, parts).tolist()
    return found


def test_ranks_share_the_rows_and_find_the_same(pair: Any) -> None:
    """Five rows of a domain in batches of eight a rank: one rank has fewer, and in the last domain maybe none."""
    first, second = pair.run(measured)
    assert first == second == pytest.approx(measured(), rel=1e-9)


# --- training


def test_its_loss_is_that_of_labels_and_of_the_forward_kl() -> None:
    made = trainer(gamma=0.7, temperature=2.0)
    batch = made._on_device(made.source.fetch(range(5)))
    student, teacher = (
        made.student.outputs(made.student(batch.inputs)),
        made.setup.teachers["teacher"].outputs(batch),
    )
    terms = made.method.objective(student, teacher, batch, Step(made.setup, batch, 0))
    wanted = ddk_loss(student.logits, teacher.logits, batch.target, gamma=0.7, temperature=2.0)
    torch.testing.assert_close(sum(term.mean for term in terms.values()), wanted.loss)
    assert set(terms) == {"label", "forward_kl"}
    assert {term.items for term in terms.values()} == {"tokens"}


def by_hand(made: Any) -> Tensor:
    """The student's perplexity of each domain, from its logits."""
    found = []
    validation = made.setup.data.rows("validation").source
    for rows in rows_by_domain(validation, "source").values():
        batch: Any = subset(validation, rows).fetch(range(len(rows)))
        made.student.eval()
        with torch.no_grad():
            logits = made.student.outputs(made.student(batch.inputs)).logits.double()
        found.append(per_instance_nll(logits, batch.target.clamp(min=0), batch.mask).mean().exp())
        made.student.train()
    return torch.stack(found)


def test_the_mixture_follows_the_gaps_from_interval_to_interval() -> None:
    made = trainer(alpha=0.8)
    made.run(2)
    first = by_hand(made)
    teacher = made.method.teacher_perplexity
    sizes = torch.tensor([float(len(rows)) for rows in made.sampler.rows], dtype=torch.float64)
    wanted = ddk_update_factor(sizes / sizes.sum(), first, teacher, alpha=0.8)
    torch.testing.assert_close(made.sampler.factor, wanted, rtol=1e-5, atol=1e-6)
    made.run(2)
    again = ddk_update_factor(wanted, by_hand(made), teacher, alpha=0.8)
    torch.testing.assert_close(made.sampler.factor, again, rtol=1e-5, atol=1e-6)
    assert made.sampler.interval == 2
    assert made.student.training


def test_without_history_the_present_gaps_alone_decide() -> None:
    made = trainer(alpha=1.0, history=False)
    made.run(2)
    wanted = ddk_initial_factor(by_hand(made), made.method.teacher_perplexity)
    torch.testing.assert_close(made.sampler.factor, wanted, rtol=1e-5, atol=1e-6)


def test_the_first_interval_may_follow_the_untrained_student() -> None:
    made = trainer(first_interval="factor")
    before = by_hand(made)
    made.run(1)
    wanted = ddk_initial_factor(before, made.method.teacher_perplexity)
    torch.testing.assert_close(made.sampler.factor, wanted, rtol=1e-5, atol=1e-6)
    assert made.method.history[0]["shares"] == made.sampler.factor.tolist()


def test_no_share_falls_below_the_floor_and_alpha_zero_spreads_evenly() -> None:
    made = trainer(alpha=0.0)
    made.run(2)
    assert made.sampler.factor.tolist() == pytest.approx([1 / 3] * 3)
    made = trainer(alpha=0.6, train={"optimizer": {"name": "sgd", "lr": 1.0}})
    made.run()
    assert min(min(row["shares"]) for row in made.method.history[1:]) >= 0.4 / 3 - 1e-12


def test_a_ratio_that_explodes_is_cut_and_said() -> None:
    made = trainer(ratio_clip=1.0)
    made.method.names = ["a", "b", "c"]
    made.method.teacher_perplexity = torch.tensor([2.0, 2.0, 2.0], dtype=torch.float64)
    ppl, clipped = made.method._clipped(torch.tensor([1.5, 1e5, 2.0], dtype=torch.float64))
    assert ppl.tolist() == [1.5, 2.0, 2.0]
    assert clipped == ["b"]
    with pytest.warns(UserWarning, match=r"on b is more than 1 times the teacher's \(method.ratio_clip\)"):
        made.method._note(4, ppl / 2, clipped)
    assert made.method.tables()["domain gaps"].rows[-1][-1] == "b"


@pytest.mark.parametrize(("options", "steps"), [({"max_intervals": 2}, 4), ({"stop_gap": 1.0}, 2)])
def test_it_ends_after_so_many_intervals_or_once_shares_hardly_differ(
    options: dict[str, Any], steps: int, tmp_path: Path
) -> None:
    result = run(tmp_path / "run", recipe(**options)).result
    assert (result["steps"], result["stopped_early"]) == (steps, True)
    assert result["test"]["loss"] > 0
    assert run(tmp_path / "run", recipe(**options), resume=True).result == result


def test_its_tables_show_the_mixture_over_time_and_what_was_read(tmp_path: Path) -> None:
    result = run(tmp_path / "run", recipe({"steps": 5})).result
    shares, gaps, domains = (result["tables"][name] for name in ("domain mixture", "domain gaps", "domains"))
    assert shares["columns"] == ["interval", "step", "a", "b", "c"]
    assert [row[:2] for row in shares["rows"]] == [[0, 0], [1, 2], [2, 4]]
    assert all(sum(row[2:]) == pytest.approx(1) for row in shares["rows"])
    assert shares["plots"] == [{"x": "interval", "y": ["a", "b", "c"]}]
    assert len(gaps["rows"]) == 3
    names, rows, read, epochs, teacher, student, ratio = zip(*domains["rows"], strict=True)
    assert names == ("a", "b", "c")
    assert sum(read) == 5 * 8
    assert epochs == pytest.approx([r / n for r, n in zip(read, rows, strict=True)])
    assert ratio == pytest.approx([s / t for s, t in zip(student, teacher, strict=True)])
    metrics = result["validation"]
    assert student == pytest.approx([metrics[f"perplexity[source={name}]"] for name in names], rel=1e-5)


def test_a_store_serves_where_it_knows_the_domains(tmp_path: Path) -> None:
    """Its teacher's perplexities are those that were measured when it was made."""
    stored = recipe() | {"cache": {"form": "topk", "k": 4}}
    cache(stored, tmp_path / "store", progress=False)
    values = recipe({"steps": 4}) | {"teacher": {"store": str(tmp_path / "store")}}
    found, live = (run(tmp_path / name, each) for name, each in {"stored": values, "live": recipe()}.items())
    assert teachers(found) == pytest.approx(teachers(live), rel=1e-5)
    cache(stored | {"evaluation": {}}, tmp_path / "plain", progress=False)
    values["teacher"]["store"] = str(tmp_path / "plain")
    with pytest.raises(
        ValueError, match=r"validation rows of domain 'a', and the store has none.*group_by: source"
    ):
        run(tmp_path / "refused", values)


def teachers(result: RunResult) -> list[float]:
    return [row[4] for row in result.result["tables"]["domains"]["rows"]]


# --- resume and launches


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return run(tmp_path_factory.mktemp("ddk") / "run", recipe({"checkpoint": {"every": 1}}, interval=3))


@pytest.mark.parametrize("step", [2, 3, 5])
def test_a_run_killed_inside_an_interval_ends_with_the_same_bits(
    step: int, finished: RunResult, tmp_path: Path
) -> None:
    values = recipe({"checkpoint": {"every": 1}}, interval=3)
    stop_after(step, lambda kill: run(tmp_path / "run", values, callbacks=[kill]))
    resumed = run(tmp_path / "run", values, resume=True)
    left, right = (
        load_file(result.folder / "student" / "model.safetensors") for result in (finished, resumed)
    )
    assert all(torch.equal(value, right[name]) for name, value in left.items())
    assert resumed.result["tables"] == finished.result["tables"]


def numbers(row: list[Any]) -> list[float]:
    return [cell for cell in row if not isinstance(cell, str)]


def trained(folder: str, sharding: str) -> dict[str, Any]:
    return run(folder, recipe({"sharding": sharding, "checkpoint": {}})).result


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_ranks_read_the_same_mixture_as_one_process(sharding: str, pair: Any, tmp_path: Path) -> None:
    alone = run(tmp_path / "one", recipe({"checkpoint": {}})).result
    found = pair.run(trained, str(tmp_path / "two"), sharding)
    for result in found:
        for name, table in alone["tables"].items():
            for left, right in zip(table["rows"], result["tables"][name]["rows"], strict=True):
                assert numbers(right) == pytest.approx(numbers(left), rel=1e-4)
        assert result["test"] == pytest.approx(alone["test"], rel=1e-4)


# --- what is refused


def test_a_domain_that_cannot_be_measured_or_read_is_named_before_anything_is_spent() -> None:
    made = trainer()
    rows = made.setup.data.rows("validation")
    with pytest.raises(ValueError, match=r"domain 'd' of the column 'source' has no validation row"):
        held_out_rows(rows, "source", ["a", "b", "c", "d"], 5)
    with pytest.raises(ValueError, match=r"domain 'c' .* has validation rows but no training row"):
        held_out_rows(rows, "source", ["a", "b"], 5)


def test_a_dry_run_finds_a_domain_without_validation_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no validation row"):
        check(recipe(data={"validation": 2}))
    assert list(tmp_path.iterdir()) == []


def test_a_column_that_does_not_travel_with_the_rows_is_refused() -> None:
    with pytest.raises(PairingError, match=r"`ddk` needs `source` in every batch.*data.columns"):
        assemble(load_recipe(recipe(data={"columns": []}) | {"evaluation": {}}))
    with pytest.raises(PairingError, match=r"needs the further data `validation`"):
        assemble(load_recipe(recipe(data={"validation": None})))


def test_a_mixture_that_can_starve_or_never_changes_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"method.alpha is 1"):
        trainer(alpha=1.0)
    with pytest.warns(UserWarning, match=r"train.steps is 6 and method.interval 6, so the mixture never"):
        trainer(interval=6)

"""A store serves every method that reads only what a store holds, with the losses that a live teacher gives; what it
cannot serve is refused before the first step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import contract
import pytest
import stores
import torch

from tutelage import catalogue
from tutelage.engine.combine import Combined
from tutelage.engine.method import Method
from tutelage.engine.needs import PairingError
from tutelage.engine.types import Batch, TopK
from tutelage.models import build_model, save_model
from tutelage.recipe import load_recipe
from tutelage.runs import check, distill
from tutelage.runs.assemble import assemble
from tutelage.runs.explain import explain
from tutelage.teachers.manifest import StoreError
from tutelage.teachers.store import MissingRowsError, Store, StoredTeacher


def _serves(name: str) -> bool:
    method = catalogue.load(name)
    needs = method.needs
    return (
        issubclass(method, Method)
        and needs.teacher == "frozen"
        and "classification" in needs.tasks
        and not (needs.live or needs.input_gradient or needs.text)
    )


NAMES = [name for name in catalogue.names() if _serves(name)]


def _alone(name: str) -> bool:
    """Whether a method has a loop of its own, and so cannot be combined."""
    method = catalogue.load(name)
    config = method.Config(name=name, **contract.OPTIONS.get(name, {}))
    try:
        Combined([method(config), method(config)])
    except PairingError:
        return True
    return False


_SHARING = [name for name in NAMES if not _alone(name)]
TOGETHER = [_SHARING[start::4] for start in range(4)]
"""Every method that can be combined, several at a time."""


def losses(recipe: dict[str, Any]) -> list[float]:
    run = assemble(load_recipe(recipe)).trainer(None)
    found: list[float] = []
    for _ in range(run.total_steps):
        run.run(1)
        found.append(float(sum(value for value in run.last[0].values())))
    return found


def test_it_has_the_fingerprint_of_the_model_behind_it(tmp_path: Path) -> None:
    """So a method that keeps what it found of a teacher (nd) may go on from either."""
    stores.make(tmp_path / "store")
    found = [
        assemble(load_recipe(stores.recipe(teacher=teacher))).teachers["teacher"].spec.fingerprint()
        for teacher in (stores.TEACHER, {"store": str(tmp_path / "store")})
    ]
    assert found[0] == found[1] is not None


def test_there_is_something_to_hold() -> None:
    assert len(NAMES) > 10
    assert min(map(len, TOGETHER)) > 1


@pytest.mark.parametrize("names", [*([name] for name in NAMES), *TOGETHER], ids="+".join)
def test_a_store_gives_the_losses_of_a_live_teacher(names: list[str], tmp_path: Path) -> None:
    stores.make(tmp_path / "store", names, cache={"shard_rows": 50})
    live = losses(stores.recipe(names))
    assert losses(stores.recipe(names, teacher={"store": str(tmp_path / "store")})) == pytest.approx(
        live, rel=1e-6
    )


def test_one_store_serves_many_epochs_and_seeds(tmp_path: Path) -> None:
    """Views come in turn, and their seed is not the run's."""
    save_model(build_model("digits:cnn-6-8", outputs=10, input_shape=(1, 8, 8)), tmp_path / "run" / "student")
    teacher = {"run": str(tmp_path / "run")}
    stores.make(tmp_path / "store", teacher=teacher)
    stored = {"store": str(tmp_path / "store")}
    found = []
    for seed in (3, 4):
        train = {"steps": None, "epochs": 5, "seed": seed}
        found.append(losses(stores.recipe(teacher=stored, train=train)))
        live = losses(stores.recipe(teacher=teacher, train=train))
        assert found[-1] == pytest.approx(live, rel=1e-6)
    assert found[0] != pytest.approx(found[1], rel=1e-3)


def test_rows_without_random_views_are_stored_once(tmp_path: Path) -> None:
    data: dict[str, Any] = {"views": [], "distinct_views": None, "view_seed": None}
    assert stores.make(tmp_path / "store", data=data).manifest.plan.total == 64
    train = {"steps": 11}
    live = losses(stores.recipe(data=data, train=train))
    stored = stores.recipe(teacher={"store": str(tmp_path / "store")}, data=data, train=train)
    assert losses(stored) == pytest.approx(live, rel=1e-6)


def test_a_whole_run_from_a_store(tmp_path: Path) -> None:
    """No model in memory; what is known of the teacher comes from the store."""
    live = distill(stores.recipe(), folder=tmp_path / "live", progress=False).result
    stores.make(tmp_path / "store")
    recipe = stores.recipe(teacher={"store": str(tmp_path / "store")}, output={"report": True})
    assert check(recipe)["teachers"] == check(stores.recipe())["teachers"]
    stored = distill(recipe, folder=tmp_path / "stored", progress=False).result
    assert (tmp_path / "stored" / "report.html").exists()
    ours, theirs = stored["teachers"]["teacher"], live["teachers"]["teacher"]
    for key in ("model", "parameters", "flops"):
        assert ours[key] == theirs[key]
    for split in ("validation", "test"):
        assert ours[split] == pytest.approx({k: v for k, v in theirs[split].items() if k != "agreement"})
    assert stored["test"] == pytest.approx(
        {k: v for k, v in live["test"].items() if k != "agreement"}, rel=1e-4
    )
    with pytest.raises(ValueError, match=r"learned from a store \(teacher\)"):
        explain(tmp_path / "stored")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return stores.opened(tmp_path_factory.mktemp("store") / "kd", cache={"shard_rows": 30})


def test_rows_are_read_in_any_order_from_any_shard(store: Store) -> None:
    assembly = assemble(load_recipe(stores.recipe()))
    run = assembly.trainer(None)
    whole = run.views(assembly.data.train.fetch(range(64)), torch.zeros(64, dtype=torch.int64))
    again = run.views(assembly.data.train.fetch(range(64)), torch.ones(64, dtype=torch.int64))
    live = torch.cat([assembly.teachers["teacher"].outputs(batch).logits for batch in (whole, again)])
    assert whole.index is not None
    index = torch.cat([whole.index, whole.index])
    view = torch.arange(128) // 64
    for count in (128, 17, 1):
        order = torch.randperm(128, generator=torch.Generator().manual_seed(count))[:count]
        torch.testing.assert_close(
            store.read(index[order], view[order]).logits, live[order], atol=1e-6, rtol=1e-6
        )
    assert store.read(index[:0], view[:0]).logits.shape == (0, 10)


def test_what_was_never_stored_is_named(store: Store) -> None:
    known = int(store.ids[0])
    for index, view in ((known, 2), (known, -1), (10**9, 0), (-1, 1)):
        with pytest.raises(
            KeyError, match=rf"1 rows were never stored.*the first is .* = \({index}, {view}\)"
        ):
            store.read(torch.tensor([known, index]), torch.tensor([0, view]))
    with pytest.raises(MissingRowsError, match="it holds views 0 to 1 of 64 rows"):
        store.read(torch.tensor([known]), torch.tensor([2]))
    with pytest.raises(StoreError, match="keeps no tap 'layer9'; it has none"):
        store.read(torch.tensor([known]), torch.tensor([0]), ("layer9",))


def test_what_a_stored_teacher_cannot_do_is_refused(store: Store) -> None:
    teacher = StoredTeacher(store)
    with pytest.raises(ValueError, match="gives no gradients"):
        teacher.outputs(Batch(torch.zeros(1, 1, 8, 8)), grad="inputs")
    with pytest.raises(ValueError, match=r"read by \(index, view\); this batch has none"):
        teacher.outputs(Batch(torch.zeros(1, 1, 8, 8)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"data": {"limit": 63}},
            r"other rows \(data\): 64 of digits, fingerprint \w{12}; this run has 63 of digits",
        ),
        ({"data": {"seed": 1}}, r"other rows \(data\)"),
        (
            {"data": {"views": [{"name": "crop", "padding": 2}]}},
            r"data.views\).*padding=1.*this run draws.*padding=2",
        ),
        ({"data": {"view_seed": 6}}, r"the view seed 5; this run draws by 6; set data.view_seed=5"),
        ({"data": {"view_seed": None}}, r"the view seed 5; this run draws by 0"),
        (
            {"data": {"distinct_views": 3}, "train": {"steps": 40}},
            r"2 views of a row; this run draws 3; set data.dist",
        ),
        (
            {"data": {"distinct_views": None}, "train": {"steps": 40}},
            r"2 views of a row; this run draws 10; set data.distinct_views=2",
        ),
    ],
)
def test_a_store_of_something_else_is_refused_before_training(
    store: Store, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(PairingError, match=reason):
        distill(
            stores.recipe(teacher={"store": str(store.folder)}, **changes),
            folder=tmp_path / "run",
            progress=False,
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("fitnet", "needs inner features; this teacher gives none"),
        ("dml", "needs a live teacher; this one is stored"),
    ],
)
def test_a_method_that_needs_more_is_refused(store: Store, name: str, reason: str) -> None:
    with pytest.raises(PairingError, match=reason):
        check(stores.recipe(name, teacher={"store": str(store.folder)}))


def test_a_sparse_store_is_refused_by_a_method_that_reads_dense_logits(tmp_path: Path) -> None:
    topk = {"form": "topk", "k": 3}
    with pytest.raises(
        PairingError, match=r"`kd` needs dense logits; this teacher gives topk.*\n.*method=none"
    ):
        stores.make(tmp_path / "store", cache=topk)
    assert not (tmp_path / "store").exists()
    store = stores.opened(tmp_path / "store", "none", cache=topk)
    with pytest.raises(PairingError, match="`kd` needs dense logits; this teacher gives topk"):
        check(stores.recipe(teacher={"store": str(store.folder)}))
    found = store.read(store.ids[:4], torch.zeros(4, dtype=torch.int64))
    assert isinstance(found.stored_logits, TopK)
    with pytest.raises(ValueError, match="dense logits were asked for, but this model's outputs hold TopK"):
        assert found.logits is None


def test_log_probabilities_are_refused_where_raw_logits_are_needed(tmp_path: Path) -> None:
    store = stores.opened(tmp_path / "store", cache={"scale": "log_probs"})
    assert store.offers.scale == "log_probs"
    rows = store.read(store.ids, torch.zeros(64, dtype=torch.int64)).logits
    torch.testing.assert_close(rows.logsumexp(1), torch.zeros(64))


def test_a_tap_that_is_not_kept_is_named_with_what_keeps_it(tmp_path: Path) -> None:
    stores.make(tmp_path / "store", "fitnet")
    recipe = stores.recipe("fitnet", teacher={"store": str(tmp_path / "store")})
    kept = Store(tmp_path / "store").taps
    recipe["method"][0]["teacher_tap"] = "head:in"
    with pytest.raises(
        ValueError, match=rf"the store keeps no tap '.*', only {kept[0]}; make one with cache.taps=\["
    ):
        check(recipe)
    stores.make(tmp_path / "more", "fitnet", cache={"taps": ["head:in"]})
    check(recipe | {"teacher": {"store": str(tmp_path / "more")}})


@pytest.mark.parametrize("form", ["dense", "topk", "sampled"])
def test_logits_that_no_one_asks_for_are_not_read(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {} if form == "dense" else {"k": 3}
    store = stores.opened(tmp_path / "store", "fitnet", cache={"form": form, "dtype": "int8"} | few)
    index, view = store.ids[:4], torch.zeros(4, dtype=torch.int64)
    (tap,) = store.taps
    whole = StoredTeacher(store).outputs(Batch(index, index=index, view=view), (tap,))
    read = []
    selected = store._selected

    def watched(name: str, *rest: Any) -> torch.Tensor:
        read.append(name)
        return selected(name, *rest)

    monkeypatch.setattr(store, "_selected", watched)
    found = StoredTeacher(store).outputs(Batch(index, index=index, view=view), (tap,), logits=False)
    assert read == [f"tap:{tap}", f"scale:tap:{tap}"]
    assert found.stored_logits is None
    assert torch.equal(found.features[tap], whole.features[tap])
    assert not StoredTeacher(store).outputs(Batch(index, index=index, view=view), logits=False).features


def test_features_alone(tmp_path: Path) -> None:
    store = stores.opened(tmp_path / "store", "fitnet", cache={"form": "none"})
    assert store.offers.logits is None
    assert "logits" not in store.layout.columns
    check(stores.recipe("fitnet", teacher={"store": str(store.folder)}))
    with pytest.raises(PairingError, match="needs dense logits; this teacher gives none"):
        check(stores.recipe("kd", teacher={"store": str(store.folder)}))


def test_several_teachers_some_of_them_stored(tmp_path: Path) -> None:
    both = {"one": stores.TEACHER, "two": {"model": "digits:cnn-4"}}
    with pytest.raises(ValueError, match=r"several teachers \(one, two\); choose one by --teacher"):
        stores.make(tmp_path / "store", teacher=both)


WITHOUT: list[tuple[Callable[[Path], Any], str]] = [
    (lambda folder: folder, "holds no store"),
    (lambda folder: (folder / "plan.json").write_text("{}"), "is not finished"),
    (lambda folder: (folder / "manifest.json").write_text("{}"), "is damaged"),
]


@pytest.mark.parametrize(("prepare", "reason"), WITHOUT)
def test_no_finished_store(prepare: Callable[[Path], Any], reason: str, tmp_path: Path) -> None:
    prepare(tmp_path)
    with pytest.raises(StoreError, match=reason):
        check(stores.recipe(teacher={"store": str(tmp_path)}))

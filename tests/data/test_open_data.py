"""open_data: digits, CSV, parquet and image folders, and what it says of broken ones."""

from __future__ import annotations

import json
import multiprocessing
import socket
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
import torch
from PIL import Image

from tutelage.data import DataError, open_data, targets
from tutelage.data.cache import SharedRows
from tutelage.data.images import ImageSource
from tutelage.engine.evaluate import evaluate
from tutelage.engine.loading import Loader, ShuffleSampler
from tutelage.engine.types import Batch, Outputs
from tutelage.recipe.schema import DataConfig
from tutelage.tasks import build_task

NUMBERS = ["age", "education_num", "capital_gain", "capital_loss", "hours_per_week"]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, and the library's cache in the test's own folder."""

    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX, f"the network was asked: {address}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def opened(path: Path | str, task: str = "classification", **options: Any):
    return open_data(DataConfig(path=str(path), **options), task)


def picture(path: Path, shade: int, size: tuple[int, int] = (6, 5), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, shade if mode == "L" else (shade, 0, 255)).save(path)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Twelve images in two classes."""
    root = tmp_path / "pictures"
    for row in range(6):
        picture(root / "cat" / f"{row}.png", row)
        picture(root / "dog" / f"{row}.png", 100 + row)
    return root


def table(tmp_path: Path, columns: dict[str, list[Any]], name: str = "rows.csv") -> Path:
    pandas.DataFrame(columns).to_csv(tmp_path / name, index=False)
    return tmp_path / name


@pytest.fixture
def people(tmp_path: Path) -> Path:
    return table(
        tmp_path,
        {
            "age": list(range(20, 40)),
            "pay": [row * 0.5 for row in range(20)],
            "sex": ["Male", "Female"] * 10,
            "member": [True, False, False, True] * 5,
            "income": ["<=50K"] * 12 + [">50K"] * 8,
            "score": [row / 7 for row in range(20)],
            "a": [0, 1] * 10,
            "b": [1, 0, 0, 0] * 5,
        },
    )


# -- digits ----------------------------------------------------------------------------------------------------------


def test_digits_are_images_between_0_and_1():
    data = opened("digits", test=300)
    assert [len(source) for source in (data.train, data.validation, data.test)] == [1317, 180, 300]
    batch = data.train.fetch([0, 5])
    assert batch.inputs.shape == (2, 1, 8, 8)
    assert batch.inputs.dtype == torch.float32
    assert 0 <= float(batch.inputs.min()) <= float(batch.inputs.max()) <= 1
    assert data.info.input_shape == (1, 8, 8)
    assert data.info.outputs == 10
    assert data.info.class_names == list("0123456789")
    assert data.info.mean == pytest.approx([0.305], abs=0.01)
    assert data.info.std == pytest.approx([0.376], abs=0.01)
    assert data.info.fields == {"target", "index"}
    assert set(targets(data.train).tolist()) == set(range(10))


def test_rows_keep_the_id_of_their_source():
    data, whole = opened("digits", test=300), opened("digits", validation=None)
    for source in (data.train, data.validation, data.test):
        batch = source.fetch(list(range(0, len(source), 50)))
        same = whole.train.fetch(batch.index.tolist())
        assert torch.equal(batch.inputs, same.inputs)
        assert torch.equal(batch.target, same.target)
    held = [
        set(source.fetch(range(len(source))).index.tolist())
        for source in (data.train, data.validation, data.test)
    ]
    assert sum(map(len, held)) == len(set.union(*held)) == 1797


def test_description_is_json_and_the_fingerprint_tells_data_apart():
    described = opened("digits", limit=100).describe()
    assert json.loads(json.dumps(described)) == described
    assert described["rows"] == {"train": 100, "validation": 180}
    marks = {
        opened("digits", **options).describe()["fingerprint"]
        for options in ({}, {"limit": 100}, {"limit": 101}, {"noise": 0.1}, {"seed": 1}, {"validation": None})
    }
    assert len(marks) == 6
    assert opened("digits", limit=100).describe() == described


def test_noise_stays_with_the_row_whatever_the_limit():
    few, many, clean = (
        opened("digits", limit=n, noise=noise) for n, noise in ((50, 0.3), (500, 0.3), (500, 0))
    )
    batch = few.train.fetch(range(50))
    position = {int(row): place for place, row in enumerate(many.train.fetch(range(500)).index)}
    places = [position[int(row)] for row in batch.index]
    assert torch.equal(batch.inputs, many.train.fetch(places).inputs)
    added = many.train.fetch(range(500)).inputs - clean.train.fetch(range(500)).inputs
    assert float(added.std()) == pytest.approx(0.3, rel=0.02)


def test_digits_as_numbers_and_what_digits_are_not():
    assert opened("digits", "regression").info.outputs == 1
    assert opened("digits", "regression").train.fetch([0]).target.dtype == torch.float32
    with pytest.raises(DataError, match=r"data.image_size is 32, but `digits` is 8×8"):
        opened("digits", image_size=32)
    with pytest.raises(DataError, match="multilabel"):
        opened("digits", "multilabel")


# -- CSV -------------------------------------------------------------------------------------------------------------


def test_csv_rows_are_numbers_with_sorted_labels_and_named_columns(people):
    data = opened(people, features=["age", "pay"], target="income", columns=["sex", "member", "age", "score"])
    assert data.info.input_shape == (2,)
    assert data.info.class_names == ["<=50K", ">50K"]
    batch = data.train.fetch(range(18))
    assert batch.inputs.dtype == torch.float32
    assert torch.equal(batch.inputs[:, 0], batch.index + 20.0)
    assert torch.equal(batch.target, (batch.index >= 12).long())
    assert torch.equal(batch.columns["sex"], (batch.index % 2 == 0).long())  # Female 0, Male 1
    assert torch.equal(batch.columns["age"], batch.index + 20)
    assert batch.columns["score"].dtype == torch.float32
    assert data.train.names == {"sex": ("Female", "Male"), "member": ("False", "True")}
    assert data.info.fields == {"target", "index", "sex", "member", "age", "score"}
    inputs = batch.inputs.double()
    assert data.info.mean == pytest.approx(inputs.mean(0).tolist())
    assert data.info.std == pytest.approx(inputs.std(0, unbiased=False).tolist())


def test_csv_serves_regression_and_several_labels(people):
    data = opened(people, "regression", features=["age"], target=["score", "pay"])
    assert data.info.outputs == 2
    assert data.train.fetch([0]).target.shape == (1, 2)
    data = opened(people, "multilabel", features=["age"], target=["a", "b"])
    assert data.info.outputs == 2
    assert data.info.class_names == ["a", "b"]
    assert set(targets(data.train).flatten().tolist()) == {0.0, 1.0}
    assert opened(people, features=["age"], target="a").info.outputs == 2
    assert opened(people, features=["age"], target="member").info.class_names == ["False", "True"]


def test_noise_on_numbers_is_in_units_of_their_range(tmp_path):
    path = table(tmp_path, {"wide": [0, 1000] * 300, "narrow": [0, 1] * 300, "label": [0, 1] * 300})
    data, clean = (
        opened(path, features=["wide", "narrow"], noise=noise, validation=None) for noise in (0.1, 0)
    )
    added = data.train.fetch(range(600)).inputs - clean.train.fetch(range(600)).inputs
    assert added.std(0).tolist() == pytest.approx([100, 0.1], rel=0.1)


def test_constant_columns_have_deviation_1(tmp_path):
    path = table(tmp_path, {"same": [7.3] * 10, "label": [0, 1] * 5})
    assert opened(path, features=["same"]).info.std == (1.0,)


BROKEN = {
    "x": [1.0, 2.0, 3.0, 4.0],
    "hole": [1.0, 2.0, None, 4.0],
    "huge": [1.0, float("inf"), 3.0, 4.0],
    "large": [1.0, 2.0, 3.0, 1e300],
    "word": ["a", "b", "a", "b"],
    "label": [0, 1, 0, 1],
    "minus": [0, 1, -1, 1],
    "half": [0, 1, 0.5, 1],
    "one": [0, 0, 0, 0],
    "holes": ["a", "b", None, "b"],
    "two": [0, 1, 2, 1],
}


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("classification", {"features": ["x", "hole"]}, r"row 2 of column 'hole', split 'train', is missing"),
        ("classification", {"features": ["x", "huge"]}, r"row 1 of column 'huge', split 'train', is inf"),
        ("classification", {"features": ["large"]}, r"row 3 of column 'large'.*float32"),
        (
            "classification",
            {"features": ["word"]},
            r"column 'word' of split 'train' holds no numbers but 'a'",
        ),
        ("classification", {"features": ["wrd"]}, r"data.features: .*no column 'wrd'.*did you mean 'word'"),
        ("classification", {"features": ["x"], "target": "lable"}, r"data.target: .*did you mean 'label'"),
        ("classification", {"features": ["x"], "columns": ["sex"]}, r"data.columns: .*no column 'sex'"),
        (
            "classification",
            {"features": ["x"], "target": "minus"},
            r"row 2 of column 'minus'.*label -1; allowed: 0 to 1",
        ),
        (
            "classification",
            {"features": ["x"], "target": "half"},
            r"row 2 of column 'half'.*is 0.5, no class id",
        ),
        ("classification", {"features": ["x"], "target": "one"}, r"1 class \(0\); classification needs two"),
        ("classification", {"features": ["x"], "target": "holes"}, r"row 2 of column 'holes', .*is missing"),
        ("classification", {"features": ["x"], "target": ["one", "two"]}, r"names 2: set task: multilabel"),
        ("classification", {}, r"0 columns with images \(none\); set data.features"),
        ("classification", {"image": "word"}, r"data.image is 'word', whose values are no images"),
        ("classification", {"features": ["x"], "image_size": 8}, r"data.image_size is set"),
        ("multilabel", {"features": ["x"], "target": "label"}, r"several target columns.*'label' alone"),
        (
            "multilabel",
            {"features": ["x"], "target": ["label", "two"]},
            r"row 2 of column 'two'.*is 2; a label",
        ),
        ("regression", {"features": ["x"], "target": "hole"}, r"row 2 of column 'hole'"),
    ],
)
def test_broken_tables_are_named_by_row_and_column(tmp_path, task, options, message):
    path = table(tmp_path, BROKEN)
    with pytest.raises(DataError, match=message):
        open_data(DataConfig(path=str(path), validation=None, **options), task)


def test_labels_of_other_splits_must_be_known(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    table(folder, {"x": [1, 2, 3], "label": ["b", "a", "b"], "number": [0, 1, 1]}, "train.csv")
    table(folder, {"x": [1, 2], "label": ["a", "c"], "number": [1, 2]}, "test.csv")
    with pytest.raises(
        DataError, match=r"row 1 of column 'label', split 'test', is 'c', which no training row has"
    ):
        opened(folder, features=["x"], validation=None)
    with pytest.raises(
        DataError, match=r"row 1 of column 'number', split 'test', is the label 2; allowed: 0 to 1"
    ):
        opened(folder, features=["x"], target="number", validation=None)
    data = opened(folder, features=["x"], columns=["label"], target="x", validation=None, test=1)
    assert data.train.names == {"label": ("a", "b")}
    data = open_data(
        DataConfig(path=str(folder), features=("x",), columns=("label",), target="x", validation=None),
        "regression",
    )
    assert data.train.names == {"label": ("a", "b", "c")}  # one code for all splits
    assert data.test.fetch([1]).columns["label"].tolist() == [2]


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("./nothing", {}, r"data.path: there is no file or folder './nothing'"),
        ("nothing.csv", {}, r"there is no file or folder 'nothing.csv'"),
        (
            "nobody/nothing",
            {},
            r"'nobody/nothing' is neither `digits`, a local path, nor a data set that the hub gives",
        ),
        (
            "{tmp}/notes.txt",
            {},
            r"is the file .*notes.txt'; allowed: .csv, .parquet, .json, .jsonl, or a folder",
        ),
        ("{tmp}/empty", {}, r"empty' cannot be read"),
        ("{tmp}", {"config": "main"}, r"data.config is for the hub"),
        ("{tmp}", {"revision": "v1"}, r"data.revision is for the hub"),
    ],
)
def test_paths_that_lead_nowhere(tmp_path, path, options, message):
    (tmp_path / "notes.txt").write_text("words")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        opened(path.format(tmp=tmp_path), **options)


def test_the_fingerprint_is_that_of_the_contents(tmp_path, people):
    options = {"features": ["age"], "target": "income"}
    copy = tmp_path / "elsewhere" / "rows.csv"
    copy.parent.mkdir()
    copy.write_bytes(people.read_bytes())
    first = opened(people, **options).train.fingerprint
    assert opened(copy, **options).train.fingerprint == first
    copy.write_text(people.read_text().replace("39,", "38,"))
    assert opened(copy, **options).train.fingerprint != first


def test_progress_bars_are_left_as_they_were(people):
    datasets.enable_progress_bars()
    opened(people, features=["age"], target="income")
    assert not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    opened(people, features=["age"], target="income")
    assert datasets.are_progress_bars_disabled()


# -- images ----------------------------------------------------------------------------------------------------------


def test_an_image_folder_has_a_class_a_folder(pictures):
    data = opened(pictures, validation=4)
    assert isinstance(data.train, ImageSource)
    assert data.info.class_names == ["cat", "dog"]
    assert data.info.input_shape == (3, 5, 6)
    batch = data.train.fetch(range(8))
    assert batch.inputs.dtype == torch.uint8
    assert torch.equal(batch.inputs[:, 0, 0, 0].long(), batch.index + batch.target * 94)
    assert bool((batch.inputs[:, 2] == 255).all())
    assert data.info.mean[1:] == pytest.approx((0, 1))


def test_decoded_images_are_kept_and_right_in_any_order(pictures, monkeypatch):
    data = opened(pictures, validation=None)
    first = data.train.fetch([7, 3, 7])
    decoded: list[list[int]] = []
    monkeypatch.setattr(data.train, "_decode", lambda rows: decoded.append(rows.tolist()))
    again = data.train.fetch([3, 7])
    assert decoded == []
    assert torch.equal(again.inputs, first.inputs[[1, 0]])
    monkeypatch.undo()
    monkeypatch.setattr("tutelage.data.cache.LARGEST", 10)
    plain = opened(pictures, validation=None).train
    assert plain.cache is None
    assert torch.equal(plain.fetch([7, 3, 7]).inputs, first.inputs)


def test_splits_may_be_folders(tmp_path, pictures):
    root = tmp_path / "both"
    (root / "train").parent.mkdir()
    pictures.rename(root / "train")
    picture(root / "test" / "dog" / "0.png", 9)
    data = opened(root, validation=None)
    assert data.test.fetch([0]).target.tolist() == [1]
    assert data.test.fetch([0]).inputs[0, 0, 0, 0] == 9


@pytest.mark.parametrize("kept", [0, 20, 50])
def test_an_unreadable_image_is_named_by_row_and_split(pictures, kept):
    broken = pictures / "dog" / "2.png"
    broken.write_bytes(broken.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"image of row 8 of split 'train' \(.*dog/2.png\) cannot be read"):
        opened(pictures, validation=None)


def test_an_image_of_another_size_is_refused_with_both_sizes(pictures):
    picture(pictures / "dog" / "3.png", 103, (8, 4))
    with pytest.raises(DataError, match=r"row 9 of split 'train' is 8×4 pixels.*is 6×5; set data.image_size"):
        opened(pictures, validation=None)
    batch = opened(pictures, validation=None, image_size=3).train.fetch(range(12))
    assert batch.inputs.shape == (12, 3, 3, 3)
    assert batch.inputs[9, :, 1, 1].tolist() == [103, 0, 255]


def test_grey_and_colour_follow_the_first_row(tmp_path, pictures):
    picture(pictures / "dog" / "3.png", 77, mode="L")
    batch = opened(pictures, validation=None).train.fetch([9])
    assert batch.inputs[0, :, 0, 0].tolist() == [77, 77, 77]
    picture(pictures / "cat" / "0.png", 5, mode="L")
    data = opened(pictures, validation=None)
    assert data.info.input_shape == (1, 5, 6)
    assert data.train.fetch([9]).inputs[0, 0, 0, 0] == 77
    deep = Image.fromarray(np.full((5, 6), 40_000, dtype=np.uint16))
    deep.save(pictures / "cat" / "1.png")
    with pytest.raises(DataError, match=r"row 1 of split 'train' has the mode 'I;16'"):
        opened(pictures, validation=None)


def test_loader_processes_fill_one_cache(pictures):
    source = opened(pictures, validation=None).train
    source.cache = SharedRows(len(source), source.wanted.shape)  # what opening decoded is forgotten
    loader = Loader(source, ShuffleSampler(12, 0), batch_size=4, workers=2)
    taken = loader.steps(0)
    batches = [next(taken)[0] for _ in range(3)]
    assert len(source.cache.missing(torch.arange(12))) == 0
    for batch in batches:
        assert torch.equal(batch.inputs[:, 0, 0, 0].long(), batch.index + batch.target * 94)


def _fill(cache: SharedRows) -> None:
    cache.put(torch.tensor([2]), torch.full((1, 3), 9, dtype=torch.uint8))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_cache_is_shared_with_processes_of_any_kind(method):
    cache = SharedRows(5, (3,))
    process = multiprocessing.get_context(method).Process(target=_fill, args=(cache,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert cache.missing(torch.arange(5)).tolist() == [0, 1, 3, 4]
    assert cache.get(torch.tensor([2])).tolist() == [[9, 9, 9]]


# -- real data -------------------------------------------------------------------------------------------------------


def test_cifar10_from_a_local_folder(data_root):
    data = opened(data_root / "cifar10", limit=3000, evaluation_limit=500)
    assert data.describe()["rows"] == {"train": 3000, "validation": 500, "test": 500}
    assert data.info.class_names[:2] == ["airplane", "automobile"]
    assert data.info.mean == pytest.approx([0.491, 0.482, 0.447], abs=0.02)
    assert data.info.std == pytest.approx([0.247, 0.243, 0.262], abs=0.02)
    rows = list(range(128))
    data.train.fetch(rows)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        data.train.fetch(rows)
        best = min(best, time.perf_counter() - start)
    assert best < 1e-3


def test_adult_gives_metrics_by_sex(data_root):
    data = opened(
        data_root / "adult", features=NUMBERS, target="income", columns=["sex", "race"], evaluation_limit=2000
    )
    assert data.info.class_names == ["<=50K", ">50K"]

    def student(batch: Batch) -> Outputs:
        assert isinstance(batch.inputs, torch.Tensor)
        rich = (batch.inputs[:, 1] > 12).float()
        return Outputs(torch.stack([1 - rich, rich], 1))

    task = build_task("classification", 2)
    found = evaluate(
        student, data.test, task, names=["accuracy"], group_by="sex", batch_size=300, device="cpu"
    )
    assert list(found) == ["accuracy", "accuracy[sex=Female]", "accuracy[sex=Male]"]
    assert 0.7 < found["accuracy"] < 0.85
    assert found["accuracy[sex=Female]"] > found["accuracy[sex=Male]"]


def test_text_is_no_image(data_root):
    with pytest.raises(DataError, match=r"0 columns with images \(none\).*Columns: sentence, label"):
        opened(data_root / "sst2")

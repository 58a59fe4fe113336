"""No file of ours unpickles, evaluates text, opens a shell, or trusts code that nobody asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
from unsafe_code import found_in

FOLDERS = ("src", "tools", "benchmarks", "examples", "setup.py")
ALLOWED = {
    # Bytes that the ranks of one run send each other, each started by the same user: no file, and nothing from outside.
    ("src/tutelage/engine/runtime.py", "torch.distributed.all_gather_object"),
    ("src/tutelage/engine/runtime.py", "torch.distributed.broadcast_object_list"),
    ("src/tutelage/engine/evaluate.py", "torch.distributed.all_gather_object"),
    # After `refuse_pickles` has looked at the archive.
    ("src/tutelage/export/reading.py", "torch.export.load"),
    # With a loader of our own, which builds nothing but mappings, lists, text, numbers, true, false and null.
    ("src/tutelage/recipe/text.py", "yaml.load"),
    ("src/tutelage/report/load.py", "yaml.load"),
}
"""Each with its reason; one that is no longer there fails too."""


def test_nothing_unsafe_is_done_anywhere(repository: Path) -> None:
    files = [path for name in FOLDERS for path in _python(repository / name)]
    assert len(files) > 250
    found = {
        (path.relative_to(repository).as_posix(), what): line
        for path in files
        for line, what in found_in(path.read_text(encoding="utf-8"))
    }
    assert {
        f"{file}:{line}: {what}" for (file, what), line in found.items() if (file, what) not in ALLOWED
    } == set()
    assert found.keys() >= ALLOWED, "an exception that nothing needs"


def _python(path: Path) -> list[Path]:
    found = [path] if path.is_file() else sorted(path.rglob("*.py"))
    return [each for each in found if not any(part.startswith(".") for part in each.relative_to(path).parts)]


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import pickle", "pickle"),
        ("from pickle import loads", "pickle"),
        ("import dill as json", "dill"),
        ("def f():\n    import joblib", "joblib"),
        ("import torch\ntorch.load(f)", "torch.load"),
        ("import torch\ntorch.load(f, weights_only=False)", "weights_only=False"),
        ("from torch import load as read\nread(f)", "torch.load"),
        ("from torch import load\nlist(map(load, files))", "torch.load"),
        ("import torch.jit\ntorch.jit.load(f)", "torch.jit.load"),
        (
            "import torch.distributed as dist\ndist.all_gather_object(a, b)",
            "torch.distributed.all_gather_object",
        ),
        ("import numpy as np\nnp.load(f, allow_pickle=True)", "allow_pickle=True"),
        ("import pandas as pd\npd.read_pickle(f)", "pandas.read_pickle"),
        ("import yaml\nyaml.load(f, yaml.FullLoader)", "yaml.FullLoader"),
        ("import yaml\nyaml.unsafe_load(f)", "yaml.unsafe_load"),
        ("import yaml\nclass L(yaml.Loader): ...", "yaml.Loader"),
        ("eval(text)", "eval"),
        ("exec(compile(text, '', 'exec'))", "compile"),
        ("import os\nos.system('ls')", "os.system"),
        ("import subprocess\nsubprocess.run('ls', shell=True)", "shell=True"),
        ("f(trust_remote_code=True)", "trust_remote_code=True"),
        ("f(**{'trust_remote_code': True})", "trust_remote_code=True"),
    ],
)
def test_each_unsafe_thing_is_seen(source: str, what: str) -> None:
    assert what in {name for _, name in found_in(source)}


@pytest.mark.parametrize(
    "source",
    [
        "import re\nre.compile('a')",
        "model.eval()",
        "import torch\ntorch.compile(f)",
        "import ast\nast.literal_eval('1')",
        "f(trust_remote_code=config.trust_remote_code)",
        "import numpy as np\nnp.load(f, allow_pickle=False)",
        "from safetensors.torch import load_file\nload_file(f)",
        "import subprocess\nsubprocess.run(['ls'], check=True)",
    ],
)
def test_what_is_safe_passes(source: str) -> None:
    assert not list(found_in(source))

"""Help and shell completion: they teach, and are quick because torch stays out."""

from __future__ import annotations

from pathlib import Path

import pytest
from typed import in_a_process, tutelage

VERBS = (
    "run",
    "cache",
    "compare",
    "resume",
    "report",
    "explain",
    "export",
    "bench",
    "methods",
    "recipes",
    "taps",
    "reproduce",
    "doctor",
)
LATER = ("recommend",)


def test_help_does_not_import_torch_and_is_quick() -> None:
    code = "\n".join(
        [
            "import sys",
            "from tutelage.cli import main",
            f"for verb in {('', *VERBS)!r}:",
            "    sys.argv = ['tutelage', *verb.split(), '--help']",
            "    try: main()",
            "    except SystemExit as done: assert not done.code, verb",
            "heavy = {'torch', 'timm', 'datasets', 'transformers', 'numpy'} & set(sys.modules)",
            "assert not heavy, heavy",
        ]
    )
    in_a_process(code)
    seconds = "import time; print(time.process_time())"
    start = "import sys; sys.argv = ['tutelage', '--help']; from tutelage.cli import main"
    once = f"{start}\ntry: main()\nexcept SystemExit: {seconds}"
    # Processor time, since other tests may run beside this one.
    assert float(in_a_process(once).split()[-1]) < 0.7


@pytest.mark.parametrize(
    ("line", "offered", "not_offered"),
    [
        ("tutelage re", {"resume", "report", "recipes", "reproduce"}, {"run"}),
        ("tutelage run digits-", {"digits-teacher"}, {"cifar10"}),
        (
            "tutelage run digits train.optimizer.l",
            {"train.optimizer.lr=", "train.optimizer.layer_decay="},
            {"train="},
        ),
        ("tutelage run digits method=nk", {"method=nkd"}, {"method=kd"}),
        ("tutelage compare digits --methods none,k", {"none,kd"}, {"kd", "none,none"}),
        ("tutelage methods f", {"fitnet"}, {"kd"}),
        ("tutelage reproduce us", {"uskd"}, {"kd"}),
        ("tutelage recipes cifar10-", {"cifar10-resnet32x4"}, {"digits"}),
        ("tutelage taps ti", {"timm:"}, {"hf:"}),
    ],
)
def test_the_shell_is_offered_names_without_torch(
    line: str, offered: set[str], not_offered: set[str]
) -> None:
    position = str(len(line.split()) - 1)
    asked = {"COMP_WORDS": line, "COMP_CWORD": position, "_TUTELAGE_COMPLETE": "complete_bash"}
    code = "\n".join(
        [
            "import os, sys",
            f"os.environ |= {asked!r}",
            "from tutelage.cli import main",
            "try: main()",
            "except SystemExit: pass",
            "assert 'torch' not in sys.modules",
        ]
    )
    found = set(in_a_process(code).split())
    assert offered <= found
    assert not not_offered & found


def test_yaml_files_are_offered_beside_shipped_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tutelage.cli.complete import recipe_names
    from tutelage.recipe import shipped

    (tmp_path / "digits-mine.yaml").touch()
    (tmp_path / "digits.txt").touch()
    (tmp_path / "digits-more").mkdir()
    (tmp_path / "digits-more" / "a.yml").touch()
    monkeypatch.chdir(tmp_path)
    digits = [name for name in shipped() if name.startswith("digits")]
    assert recipe_names("digits") == [*digits, "digits-mine.yaml", "digits-more/"]
    assert recipe_names("digits-more/") == ["digits-more/a.yml"]


def test_help_teaches() -> None:
    text = tutelage("--help").stdout
    assert all(f" {verb} " in text for verb in VERBS)
    assert not any(f" {verb} " in text for verb in LATER)
    for words in ("First steps", "Exit codes", "130, 143", "3 method, teacher and data do not fit"):
        assert words in text
    for verb in VERBS[:-1]:
        shown = tutelage(verb, "--help").stdout
        assert "Example" in shown
        assert f"tutelage {verb}" in shown


def test_a_wrong_verb_or_option_is_usage() -> None:
    assert tutelage("runn", "digits").exit_code == 2
    assert "'run'" in tutelage("runn", "digits").output
    assert tutelage("run").exit_code == 2
    assert tutelage("run", "digits", "--no-such").exit_code == 2
    assert tutelage("reproduce").exit_code == tutelage("reproduce", "kd", "--all").exit_code == 2

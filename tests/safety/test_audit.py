"""`make audit`: what pip-audit's answers mean, and a bill of materials of this environment."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def tool(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", repository / "tools" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def package(name: str, *flaws: str, mended: Sequence[str] = ()) -> dict[str, Any]:
    return {
        "name": name,
        "version": "1.0",
        "vulns": [{"id": flaw, "fix_versions": list(mended)} for flaw in flaws],
    }


def answer(*packages: dict[str, Any]) -> str:
    return json.dumps({"dependencies": packages, "fixes": []})


NO_NAME = "socket.gaierror: [Errno -2]\n\nrequests.exceptions.ConnectionError: HTTPSConnectionPool\n"


@pytest.mark.parametrize(
    ("code", "out", "err", "wanted", "message"),
    [
        (0, answer(package("a"), package("b")), "", 0, "no known vulnerability in 2 packages"),
        (1, answer(package("a"), package("b", "CVE-1", "CVE-2")), "", 1, "b 1.0: CVE-1"),
        (1, answer(package("b", "CVE-1", mended=["1.1", "2.0"])), "", 1, "mended in 1.1, 2.0"),
        (0, answer(package("b", "CVE-1")), "", 1, "CVE-1"),
        (1, "", NO_NAME, 0, "NOT AUDITED"),
        (1, "", "requests.exceptions.ReadTimeout: read timed out\n", 0, "NOT AUDITED"),
        (1, "", "requests.exceptions.ProxyError: cannot connect to proxy\n", 0, "NOT AUDITED"),
        (1, "", "requests.exceptions.HTTPError: 503 Server Error\n", 0, "NOT AUDITED"),
        (1, "", "ERROR:pip_audit._cli:Could not connect to the feed\n", 0, "NOT AUDITED"),
        (1, "", "requests.exceptions.HTTPError: 400 Client Error\n", 2, "the audit failed: requests"),
        (1, "", "Traceback\nKeyError: 'x'\n", 2, "the audit failed: KeyError"),
        (1, "", "", 2, "it gave no answer"),
        (0, "", "", 2, "it gave no answer"),
        (0, "[]", "", 2, "the audit failed"),
        (0, json.dumps({"dependencies": [{"name": "c", "skip_reason": "unknown"}]}), "", 2, "left out c"),
    ],
)
def test_what_an_answer_means(
    code: int, out: str, err: str, wanted: int, message: str, tool: ModuleType
) -> None:
    asked: list[Sequence[str]] = []

    def run(command: Sequence[str]) -> Any:
        asked.append(command)
        return tool.Done(code, out, err)

    found, text = tool.audit(run)
    assert found == wanted
    assert message in text
    (command,) = asked
    assert {"--no-deps", "--disable-pip"} <= set(command), "nothing is installed for it"
    assert command[command.index("--requirement") + 1].endswith("constraints.txt")


def test_a_bill_of_materials(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cyclonedx_py")
    monkeypatch.setattr(tool, "BUILD", tmp_path)
    tool.bill_of_materials()
    content = json.loads((tmp_path / "sbom.json").read_text())
    assert content["bomFormat"] == "CycloneDX"
    assert content["metadata"]["component"]["name"] == "tutelage"
    by_name = {part["name"]: part["version"] for part in content["components"]}
    assert by_name["safetensors"].partition("+")[0] == importlib.metadata.version("safetensors")
    assert {"torch", "timm", "datasets", "pydantic"} <= by_name.keys()


def test_a_bill_of_materials_that_cannot_be_made(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "BUILD", tmp_path)
    with pytest.raises(SystemExit, match="failed: no such module"):
        tool.bill_of_materials(lambda command: tool.Done(1, "", "Traceback\nno such module\n"))

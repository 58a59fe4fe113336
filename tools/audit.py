"""What tutelage is made of, and what is known to be wrong with it.

Writes a bill of materials of this environment (CycloneDX) to build/sbom.json, and holds every version of
constraints.txt against a database of known vulnerabilities. Exit code 0: none is known, or the database cannot be
reached from here, which is said; 1: some are known; 2: the audit itself failed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build"
SECONDS = 600
UNREACHABLE = re.compile(
    r"^(requests\.exceptions\.(ConnectionError|ConnectTimeout|ReadTimeout|Timeout|ProxyError|SSLError)\b"
    r"|requests\.exceptions\.HTTPError: (407|5\d\d)\b|.*Could not connect to)",
    re.MULTILINE,
)
"""What pip-audit ends with where no answer comes."""


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def run(command: Sequence[str]) -> Done:
    """Run a Python module of this environment."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
        cwd=ROOT,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def bill_of_materials(run: Callable[[Sequence[str]], Done] = run) -> str:
    """Write build/sbom.json; what to print.

    Raises:
        SystemExit: it cannot be made.
    """
    BUILD.mkdir(exist_ok=True)
    file = BUILD / "sbom.json"
    options = [
        "--pyproject",
        str(ROOT / "pyproject.toml"),
        "--of",
        "JSON",
        "--output-reproducible",
        "--no-validate",
        "-o",
    ]
    done = run(["cyclonedx_py", "environment", *options, str(file), sys.executable])
    if done.code:
        raise SystemExit(f"the bill of materials failed: {_last_line(done.err)}")
    return f"build/sbom.json: {len(json.loads(file.read_text())['components'])} components"


def audit(run: Callable[[Sequence[str]], Done] = run) -> tuple[int, str]:
    """Ask for known vulnerabilities; exit code, and what to print."""
    # Exact versions: nothing is resolved, installed or asked of a package index.
    what = ["--requirement", str(ROOT / "constraints.txt"), "--no-deps", "--disable-pip"]
    done = run(
        [
            "pip_audit",
            *what,
            "--vulnerability-service",
            "osv",
            "--format",
            "json",
            "--progress-spinner",
            "off",
        ]
    )
    return verdict(done)


def verdict(done: Done) -> tuple[int, str]:
    """What pip-audit's output means. Its own exit code is 1 for findings and for failures alike."""
    try:
        packages = json.loads(done.out)["dependencies"]
        found = [
            f"{package['name']} {package['version']}: {flaw['id']}"
            + (f", mended in {', '.join(flaw['fix_versions'])}" if flaw["fix_versions"] else "")
            for package in packages
            for flaw in package.get("vulns", ())
        ]
    except (ValueError, KeyError, TypeError):
        if UNREACHABLE.search(done.err):
            return 0, "NOT AUDITED: the database of vulnerabilities cannot be reached from here"
        return 2, f"the audit failed: {_last_line(done.err) or 'it gave no answer'}"
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    if skipped:
        return 2, f"the audit left out {', '.join(skipped)}"
    if found:
        return 1, "\n".join(
            ["known vulnerabilities:", *sorted(found), "raise the versions, then `make constraints`"]
        )
    return 0, f"no known vulnerability in {len(packages)} packages"


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")


def main() -> None:
    print(bill_of_materials())
    code, message = audit()
    print(message, file=sys.stderr if code else sys.stdout)
    raise SystemExit(code)


if __name__ == "__main__":
    main()

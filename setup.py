"""What pyproject.toml cannot say: a wheel carries a stub of the flat namespace, so that editors and type checkers of
its users know `from tutelage.functional import nkd_loss`, whose names are otherwise found when they are asked for."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


def stub(package: Path) -> str:
    """The stub of `tutelage.functional`, from the files in the package's folder; none that needs torch is imported."""
    location = package / "functional" / "__init__.py"
    spec = importlib.util.spec_from_file_location("tutelage.functional", location)
    assert spec is not None
    assert spec.loader is not None
    functional = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(functional)
    homes = functional.scan(package)
    lines = [
        "from pathlib import Path",
        *(f"from {home} import {name} as {name}" for name, home in homes.items()),
        "def scan(root: Path) -> dict[str, str]: ...",
        f"__all__ = {sorted(homes)}",
    ]
    return "\n".join(lines) + "\n"


class BuildWithStub(build_py):
    """Writes the stub where the wheel is put together; the source tree, which an editable install uses, has none."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            package = Path(self.build_lib, "tutelage")
            (package / "functional" / "__init__.pyi").write_text(stub(package), encoding="utf-8")


if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildWithStub})

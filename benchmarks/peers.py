"""The environment of the peers: ``python -m benchmarks.peers`` makes it where there is none, or an outdated one.

What they need and tutelage's environment has, PyTorch above all, is read from there: it is not installed twice.
"""

from __future__ import annotations

import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

FOLDER = Path(__file__).parent / ".peers"
WANTED = Path(__file__).parent / "peers.txt"
PYTHON = FOLDER / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
_MADE_FROM = FOLDER / "made-from.txt"


def present() -> bool:
    """Whether it was made from the list as it is now."""
    return _MADE_FROM.is_file() and _MADE_FROM.read_text() == WANTED.read_text()


def make() -> None:
    """Make it anew.

    Raises:
        CalledProcessError: pip could not install; it has said why.
    """
    if FOLDER.exists():
        shutil.rmtree(FOLDER)
    venv.create(FOLDER, with_pip=False)
    query = [str(PYTHON), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    own = Path(subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip())
    # A path file puts these behind the environment's own packages, which so win over tutelage's.
    (own / "tutelage-environment.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    pip = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "-q", "-r", str(WANTED)]
    subprocess.run(pip, check=True)
    _MADE_FROM.write_text(WANTED.read_text())


if __name__ == "__main__":
    if not present():
        make()

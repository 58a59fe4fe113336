"""Write the stored loss curves anew: ``make curves``. A changed curve has to be explained in the pull request."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from contract import NAMES, losses, run

CURVES = Path(__file__).resolve().parent.parent / "golden" / "loss_curves"


def main() -> None:
    CURVES.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        with tempfile.TemporaryDirectory() as folder:
            found = losses(run(name, Path(folder) / "run").folder)
        (CURVES / f"{name}.json").write_text(json.dumps(found) + "\n")
        print(f"{name}: {len(found)} losses")


if __name__ == "__main__":
    main()

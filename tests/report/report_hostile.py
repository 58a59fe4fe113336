"""Runs and comparisons whose every name is markup."""

from __future__ import annotations

import json
from pathlib import Path

from report_analysis_fakes import analysis, explained, picture, tune_comparison, tuning, write_analysis
from report_fakes import RECIPE, metrics, write_comparison, write_run


def hostile_run(folder: Path, evil: str) -> Path:
    """Method, option, data, class, layer, column, loss term, error, version: all are ``evil``, pictures in part."""
    recipe = json.loads(json.dumps(RECIPE))
    recipe["data"]["path"] = f"hub/{evil}"
    recipe["method"] = [{"name": evil, evil: evil}]
    lines = metrics(epochs=3, per_epoch=4, terms=("label", evil))
    for line in lines:
        if "metrics" in line:
            line["metrics"] |= {evil: 0.5, f"accuracy[{evil}]": 0.25}
    write_run(
        folder,
        recipe=recipe,
        lines=lines,
        status="failed",
        error=evil,
        name=evil,
        methods=[evil],
        test={"accuracy": 0.5, evil: 0.25, f"accuracy[{evil}]": 0.5},
        teachers={evil: {"model": evil, "test": {evil: 0.5}}, "b": {"parameters": evil}},
        data={evil: evil, "rows": {"train": evil}},
        tables={evil: {"columns": [evil, "accuracy", f"{evil} rate"], "rows": [[evil, 0.5, 0.5], [1, 2, 1]]}},
        versions={evil: evil},
    )
    found, layers = analysis(3, examples=4), explained(evil, "b")
    found["classes"] = [evil, f"{evil}1", "c"]
    found["split"] = layers["split"] = evil
    sources = ("https://example.org/picture.png", f"data:image/png;base64,{evil}", picture() + evil, evil)
    for example, source in zip(found["examples"], sources, strict=True):
        example["picture"] = source
    layers["student"]["layers"] = [evil, "b", "c"]
    layers["teachers"][evil]["layers"] = [evil, "b"]
    return write_analysis(folder, found, layers)


def hostile_comparison(folder: Path, evil: str) -> Path:
    """Method, error, tuned option and why a trial failed are ``evil``."""
    means = {evil.replace("/", "|"): 0.8, "kd": 0.9}
    write_comparison(folder, means=means, seeds=2, failed={("kd", 1): evil})
    search = tuning(0.5, None, 0.6)
    search["ranges"][evil], search["trials"][1]["error"] = [evil], evil
    search["trials"][2]["values"] = {evil: evil}
    return tune_comparison(folder, dict.fromkeys(means, search))

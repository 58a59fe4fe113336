"""Licences that stand in the cards of data sets and models, where those are at hand. Nothing is asked over a network,
and nothing is guessed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from tutelage.recipe.schema import Recipe, TeacherConfig

UNKNOWN = "not stated"
_LARGEST_CARD = 2**20


def data_licence(recipe: Recipe) -> str:
    """The licence in the front matter of a data set's card: of a local folder, or of what the hub's cache holds."""
    return _licence(recipe.data.path, recipe.data.revision, "dataset")


def teacher_licence(config: TeacherConfig) -> str:
    """The licence of a teacher's published weights."""
    if config.model is None or config.weights is None:
        return UNKNOWN
    family, _, name = config.model.partition(":")
    if config.weights.startswith("hub:"):
        name = config.weights.removeprefix("hub:")
    elif config.weights != "pretrained":
        name = config.weights
    elif family == "timm":
        import timm

        name = timm.get_pretrained_cfg(name).hf_hub_id or ""
    return _licence(name, config.revision, "model") if name else UNKNOWN


def _licence(name: str, revision: str | None, kind: Literal["dataset", "model"]) -> str:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    place = Path(name)
    if place.exists():
        file = (place if place.is_dir() else place.parent) / "README.md"
        return _front_matter(file).get("license") or UNKNOWN
    try:
        cached = try_to_load_from_cache(name, "README.md", revision=revision, repo_type=kind)
    except HFValidationError:
        return UNKNOWN
    return (_front_matter(Path(cached)).get("license") if isinstance(cached, str) else None) or UNKNOWN


def _front_matter(file: Path) -> dict[str, str]:
    """Plain values at the head of a card; a list becomes words with commas between."""
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    if not file.is_file() or file.stat().st_size > _LARGEST_CARD:
        return {}
    try:
        found: Any = metadata_load(file)
    except (YAMLError, ValueError, OSError):
        return {}
    values = found if isinstance(found, dict) else {}
    return {
        str(key): ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        for key, value in values.items()
    }

"""What the shell offers for a half-typed word. Without torch, and quick."""

from __future__ import annotations

from pathlib import Path

MODELS = (
    "cifar:mobilenetv2",
    "cifar:resnet20",
    "cifar:resnet56",
    "cifar:resnet8x4",
    "cifar:resnet32x4",
    "cifar:shufflenetv1",
    "cifar:shufflenetv2",
    "cifar:vgg8",
    "cifar:vgg13",
    "cifar:wrn-16-2",
    "cifar:wrn-40-2",
    "config:",
    "digits:cnn-4-8-16",
    "digits:cnn-16-32-64",
    "digits:mlp-64-16",
    "hf:",
    "timm:",
)
"""Of names without end, their beginning."""


def method_names(incomplete: str) -> list[str]:
    from tutelage import catalogue

    return [name for name in catalogue.names() if name.startswith(incomplete)]


def method_lists(incomplete: str) -> list[str]:
    """Names after the last comma."""
    first, comma, last = incomplete.rpartition(",")
    return [f"{first}{comma}{name}" for name in method_names(last)]


def recipe_names(incomplete: str) -> list[str]:
    """Shipped recipes, and YAML files and folders here."""
    from tutelage.recipe import shipped

    folder = Path(incomplete) if incomplete.endswith("/") else Path(incomplete).parent
    found = [name for name in shipped() if name.startswith(incomplete)]
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if str(path).startswith(incomplete) and (path.is_dir() or path.suffix in (".yaml", ".yml")):
            found.append(f"{path}/" if path.is_dir() else str(path))
    return found


def override_keys(incomplete: str) -> list[str]:
    """Paths of a recipe's fields; after ``method=`` the methods."""
    key, equals, value = incomplete.partition("=")
    if equals:
        return [f"{key}={name}" for name in method_names(value)] if key == "method" else []
    from tutelage.recipe import Recipe
    from tutelage.recipe.errors import field_paths

    schema = Recipe.model_json_schema()
    return [f"{path}=" for path in field_paths(schema, schema["$defs"]) if path.startswith(incomplete)]


def model_names(incomplete: str) -> list[str]:
    return [name for name in MODELS if name.startswith(incomplete)]


FORMATS = ("safetensors", "torch", "onnx", "int8", "int4", "onnx-int8")


def export_formats(incomplete: str) -> list[str]:
    """Formats after the last comma."""
    first, comma, last = incomplete.rpartition(",")
    return [f"{first}{comma}{name}" for name in FORMATS if name.startswith(last)]


def bench_names(incomplete: str) -> list[str]:
    """Models by name, and folders and exported files here."""
    folder = Path(incomplete) if incomplete.endswith("/") else Path(incomplete).parent
    here = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [f"{path}/" if path.is_dir() else str(path) for path in here if str(path).startswith(incomplete)]
    return [*model_names(incomplete), *(name for name in found if name.endswith(("/", ".pt2", ".onnx")))]

"""Recipes out: as YAML, and the schema of all recipes for editors."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

from tutelage import catalogue
from tutelage.recipe.config import Config, MethodConfig
from tutelage.recipe.schema import Recipe
from tutelage.recipe.text import write_yaml

Json = dict[str, Any]

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def dump(recipe: Recipe) -> str:
    """The whole recipe as YAML, defaults included: `tutelage.recipe.parse_recipe` gives an equal recipe back."""
    return write_yaml(recipe.model_dump(mode="json"))


def json_schema() -> Json:
    """JSON Schema of a recipe, with the options of every method in the catalogue. Imports all methods, and so torch."""
    configs = {name: _config(name) for name in catalogue.names()}
    schema = copy.deepcopy(_schema_with(tuple(configs.values())))
    for name, config in configs.items():
        own = copy.deepcopy(schema["$defs"][_definition(config)])
        own["properties"]["name"] = {
            "const": name,
            "description": own["properties"]["name"].get("description", ""),
        }
        own["required"] = sorted({"name", *own.get("required", ())})
        schema["$defs"][f"method-{name}"] = own
    options = [{"$ref": f"#/$defs/method-{name}"} for name in configs]
    schema["$defs"]["method"] = {"anyOf": [{"enum": list(configs)}, *options]}
    entry = {"$ref": "#/$defs/method"}
    schema["properties"]["method"] = {
        "anyOf": [entry, {"type": "array", "items": entry, "minItems": 1}],
        "description": Recipe.model_fields["method"].description,
    }
    return {"$schema": _DIALECT, **schema}


def schema_for(model: type[Config], values: Mapping[str, Any]) -> Json:
    """JSON Schema of a model; of a recipe with the options of the very methods that its values name. It is cached: not
    to be changed."""
    if not issubclass(model, Recipe):
        return _schema_of(model)
    given = values.get("method")
    configs = [_named_config(entry) for entry in (given if isinstance(given, list) else [given])]
    schema = _schema_with(tuple(config for config in configs if config))
    entries = [{"$ref": f"#/$defs/{_definition(config)}"} if config else {} for config in configs]
    if isinstance(given, list):
        method = {**schema["properties"]["method"], "prefixItems": entries}
    else:
        method = entries[0] or schema["properties"]["method"]
    return {**schema, "properties": {**schema["properties"], "method": method}}


def _config(name: str) -> type[MethodConfig]:
    config: type[MethodConfig] = catalogue.load(name).Config
    return config


def _named_config(entry: Any) -> type[MethodConfig] | None:
    """The options of the method that an entry of ``method`` names, where there is such a method."""
    name = entry.get("name") if isinstance(entry, Mapping) else entry
    return _config(name) if isinstance(name, str) and name in catalogue.entries() else None


@functools.cache
def _schema_of(model: type[Config]) -> Json:
    return model.model_json_schema()


@functools.cache
def _schema_with(configs: tuple[type[MethodConfig], ...]) -> Json:
    """The recipe's schema, with the schemas of some methods' options among its ``$defs`` under `_definition`."""
    schema = copy.deepcopy(_schema_of(Recipe))
    for config in configs:
        own = config.model_json_schema(ref_template=f"#/$defs/{_definition(config)}.{{model}}")
        inner = own.pop("$defs", {})
        schema["$defs"] |= {f"{_definition(config)}.{name}": node for name, node in inner.items()}
        schema["$defs"][_definition(config)] = own
    return schema


def _definition(config: type[MethodConfig]) -> str:
    return f"{config.__module__}.{config.__qualname__}"

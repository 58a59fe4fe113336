"""Recipes: one validated object, or YAML file, that says a whole run. Torch is imported only to check the options of
a method."""

from tutelage.recipe.config import Config, MethodConfig
from tutelage.recipe.errors import Problem, RecipeError
from tutelage.recipe.export import dump, json_schema
from tutelage.recipe.library import shipped
from tutelage.recipe.load import load_recipe, parse_recipe, validate
from tutelage.recipe.schema import Recipe

__all__ = [
    "Config",
    "MethodConfig",
    "Problem",
    "Recipe",
    "RecipeError",
    "dump",
    "json_schema",
    "load_recipe",
    "parse_recipe",
    "shipped",
    "validate",
]

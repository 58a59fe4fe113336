"""Models by name: built, saved, loaded, measured and split."""

from tutelage.models.adapters import merge_lora
from tutelage.models.build import build_model
from tutelage.models.built import BuiltModel
from tutelage.models.folder import load_model, save_model
from tutelage.models.names import ModelError
from tutelage.models.profile import ModelProfile, profile_model
from tutelage.models.split import split
from tutelage.models.table import tap_table
from tutelage.models.vocabulary import Vocabulary

__all__ = [
    "BuiltModel",
    "ModelError",
    "ModelProfile",
    "Vocabulary",
    "build_model",
    "load_model",
    "merge_lora",
    "profile_model",
    "save_model",
    "split",
    "tap_table",
]

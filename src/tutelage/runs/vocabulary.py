"""Whether the models of a run speak of the same tokens: ids are all that they exchange."""

from __future__ import annotations

from pathlib import Path

from tutelage.data import Data, open_data
from tutelage.data.tokenizer import OwnTokenizer, Tokenizer, load_tokenizer, vocabulary_difference
from tutelage.engine.needs import PairingError
from tutelage.models import Vocabulary
from tutelage.models.names import parse_name
from tutelage.models.weights import CARD
from tutelage.recipe.schema import DataConfig, ModelConfig, Recipe, TeacherConfig


def vocabulary_of(data: Data) -> Vocabulary | None:
    """What models must know of the tokeniser that makes the rows; none where they are no text."""
    found = data.info.tokenizer
    if found is None:
        return None
    return Vocabulary(found.size, found.fast.bos_token_id, found.fast.eos_token_id, found.fast.pad_token_id)


def own_tokenizer(model: ModelConfig | TeacherConfig) -> OwnTokenizer | None:
    """The tokeniser that comes with a model, of the model's revision; none where its name says none."""
    place = _place(model)
    return None if place is None else OwnTokenizer(place, model.revision, model.trust_remote_code)


def _place(model: ModelConfig | TeacherConfig) -> str | None:
    if isinstance(model, TeacherConfig) and model.run is not None:
        folder = Path(model.run)
        return str(folder if (folder / CARD).exists() else folder / "student")
    if model.model is None:
        return None
    weights = model.weights
    if weights is not None and weights.startswith("hub:"):
        return weights.removeprefix("hub:")
    if weights not in (None, "pretrained"):
        path = Path(weights).expanduser()
        return str(path if path.is_dir() else path.parent)
    family, name = parse_name(model.model)
    return name if family == "hf" else None


def check_vocabulary(teacher: str, config: TeacherConfig, ours: Tokenizer) -> None:
    """Hold a teacher's tokeniser against the one that makes the rows.

    Args:
        teacher: what messages call it.

    Raises:
        PairingError: they differ, or the teacher has weights and no tokeniser to compare.
        DataError: its tokeniser cannot be read.
    """
    theirs = own_tokenizer(config)
    if theirs is None:
        if config.weights is not None:
            raise PairingError(
                f"teacher `{teacher}` has weights and no tokeniser, so nothing says which tokens its ids are; give a "
                "folder that holds its tokeniser too"
            )
        return  # random weights, or a recipe whose run is looked at once it is trained
    _refuse_other(f"teacher `{teacher}` ({theirs.place})", ours, load_tokenizer(*theirs))


def check_student_vocabulary(student: ModelConfig, config: DataConfig, ours: Tokenizer) -> None:
    """Hold the tokeniser of a student that brings weights against ``data.tokenizer``, which makes the rows instead.

    Raises:
        PairingError: they differ.
        DataError: the student's cannot be read.
    """
    own = own_tokenizer(student)
    if student.weights is None or own is None or config.tokenizer is None:
        return
    found = vocabulary_difference(ours, load_tokenizer(*own))
    if found is not None:
        raise PairingError(
            f"the student ({own.place}) has another vocabulary than data.tokenizer ({ours.place or 'trained'}): "
            f"{found}. What its weights know belongs to its own tokens: leave data.tokenizer out, or set "
            "student.weights to null"
        )


def check_recipe_vocabulary(teacher: str, own: Recipe, recipe: Recipe, ours: Tokenizer) -> None:
    """Hold the tokeniser of a teacher's recipe against the one that makes the student's rows, before the teacher is
    trained. Its data are read where they are not the student's.

    Args:
        teacher: what messages call it.
        own: the teacher's recipe.
        recipe: the student's.

    Raises:
        PairingError: they differ, or the teacher's rows are no text.
        DataError: the teacher's data cannot be read.
    """
    tokenizer = own_tokenizer(own.student)
    if own.data == recipe.data and (own.data.tokenizer or tokenizer == own_tokenizer(recipe.student)):
        return
    theirs = open_data(own.data, own.task, tokenizer).info.tokenizer
    if theirs is None:
        raise PairingError(f"teacher `{teacher}` would be trained on {own.data.path}, which is no text")
    _refuse_other(f"teacher `{teacher}`, trained by its recipe,", ours, theirs)


def _refuse_other(teacher: str, ours: Tokenizer, theirs: Tokenizer) -> None:
    found = vocabulary_difference(ours, theirs)
    if found is not None:
        source = ours.place or "trained on the training text"
        raise PairingError(
            f"{teacher} has another vocabulary than the rows' tokeniser ({source}): {found}. Its token ids mean other "
            "tokens: take a teacher and a student of one tokeniser, or, for a student without weights, set "
            "data.tokenizer to the teacher's"
        )

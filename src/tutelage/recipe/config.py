"""The base of every configuration: frozen, complete, and closed to unknown keys. Imports pydantic alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails, PydanticCustomError

Scalar = bool | int | float | str
"""What an option that is handed on to another library may hold."""

CONFLICT = "conflict"
"""Type of the error that `Config.conflicts` leads to."""


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _mentions_list(annotation: Any) -> bool:
    return list in (annotation, get_origin(annotation)) or any(map(_mentions_list, get_args(annotation)))


def _has_number_choices(field: FieldInfo) -> bool:
    kinds = (
        {type(choice) for choice in get_args(field.annotation)}
        if get_origin(field.annotation) is Literal
        else ()
    )
    return int in kinds and bool not in kinds


def _custom(kind: str, message: str) -> PydanticCustomError:
    return PydanticCustomError(kind, "{reason}", {"reason": message})


def _line_errors(error: ValidationError) -> list[InitErrorDetails]:
    """The errors inside a ValidationError, in the form in which a new one is made of them."""
    return [
        InitErrorDetails(type=_custom(line["type"], line["msg"]), loc=line["loc"], input=line["input"])
        for line in error.errors(include_url=False)
    ]


class Config(BaseModel):
    """A frozen set of options. Unknown keys and values that are not finite are refused. Sequences are tuples; a list
    that is given becomes one."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> list[str]:
        """Why these values do not go together, one sentence each; none by default.

        Args:
            values: the fields as they were written, not yet validated, and defaults for the others. It is asked even
                where single fields are wrong, so that all errors come at once: values may be of any type.
        """
        return []

    @model_validator(mode="wrap")
    @classmethod
    def _with_conflicts(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(value, Mapping):
            return handler(value)
        value = {key: _tuples(item) for key, item in value.items()}
        conflicts = cls.conflicts(cls._defaults() | value)
        errors = [
            InitErrorDetails(type=_custom(CONFLICT, reason), loc=(), input=value) for reason in conflicts
        ]
        errors += [
            # Python takes True for 1, and so does pydantic where 1 is a choice.
            InitErrorDetails(
                type=_custom("literal_error", "true and false are no numbers"), loc=(key,), input=item
            )
            for key, item in value.items()
            if isinstance(item, bool)
            and key in cls.model_fields
            and _has_number_choices(cls.model_fields[key])
        ]
        if not errors:
            return handler(value)
        try:
            handler(value)
        except ValidationError as error:
            errors += _line_errors(error)
        raise ValidationError.from_exception_data(cls.__name__, errors)

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        super().__pydantic_init_subclass__(**options)
        lists = [name for name, field in cls.model_fields.items() if _mentions_list(field.annotation)]
        if lists:
            raise TypeError(f"{cls.__name__} is frozen: declare {', '.join(lists)} as tuple, not as list")

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        fields = cls.model_fields.items()
        return {name: field.default for name, field in fields if not field.is_required()}


@dataclass(frozen=True)
class Range:
    """Values that a search may try for a number, from ``low`` to ``high``, evenly in their logarithm."""

    low: float
    high: float

    @classmethod
    def around(cls, value: float, factor: float = 4.0) -> Range:
        """From ``value / factor`` to ``value * factor``."""
        return cls(value / factor, value * factor)


class MethodConfig(Config):
    """Options that every method has; a method's own ``Config`` adds its hyper-parameters with their bounds."""

    name: str = Field(description="Catalogue name of the method.", min_length=1)
    weight: float = Field(
        1.0, ge=0, description="Factor on the method's terms where several methods are combined."
    )

    @classmethod
    def search(cls) -> dict[str, Range]:
        """Options that a comparison tunes, beside the learning rate that it tunes for every method. By default the
        method's ``loss_weight``, from a quarter of its default to four times it, where it has one."""
        weight = cls.model_fields.get("loss_weight")
        return {} if weight is None else {"loss_weight": Range.around(weight.default)}

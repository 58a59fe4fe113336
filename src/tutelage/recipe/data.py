"""Where rows come from, and how they are changed at random."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from tutelage.recipe.config import Config
from tutelage.recipe.markov import MarkovConfig
from tutelage.recipe.parts import ClassId, Positive, Rows, Share, Text, is_number
from tutelage.recipe.tokens import TrainedTokenizerConfig, text_conflicts


class ViewConfig(Config):
    """One random change of an image, drawn anew for every (view, row) and reproducible from the seed alone."""

    name: Literal["crop", "flip", "noise", "resized_crop", "color_jitter", "erase"] = Field(
        description="The change."
    )
    padding: int = Field(4, ge=0, le=256, description="crop: pixels of reflected border before the crop.")
    probability: float = Field(0.5, ge=0, le=1, description="flip, erase: how often.")
    strength: float = Field(
        0.1,
        ge=0,
        le=1,
        description="noise: standard deviation; color_jitter: largest change; both in units of the pixel range.",
    )
    scale: tuple[Positive, Positive] = Field(
        (0.35, 1.0), description="resized_crop, erase: share of the image's area, lowest and highest."
    )

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> list[str]:
        scale = values["scale"]
        is_range = isinstance(scale, tuple) and len(scale) == 2 and all(map(is_number, scale))
        if is_range and not scale[0] <= scale[1] <= 1:
            return [f"scale is lowest and highest share, at most 1; got {scale[0]} and {scale[1]}"]
        return []


class ImbalanceConfig(Config):
    """Fewer training rows of some classes than of others, as in CIFAR-LT (Cui et al. 2019): the class at place c of C keeps
    ``ratio^(-c / (C - 1))`` of the rows that the first may keep."""

    ratio: float = Field(ge=1, le=10000, description="Rows of the first class to rows of the last.")
    order: Literal["ids", "random"] = Field(
        "ids", description="Places of the classes: by their ids, or drawn from `data.seed`."
    )


class DataConfig(Config):
    """Where rows come from and how they are split."""

    path: Text = Field(
        description="`digits`, `markov` (a language made on the spot), a hub name, a folder of parquet files, a CSV, JSON or parquet file, or a folder of images by class."
    )
    config: str | None = Field(None, description="Configuration name on the hub; a local folder has none.")
    revision: str | None = Field(None, description="Revision on the hub.")
    image: str | None = Field(None, description="Column with the image; found by its type where left out.")
    features: tuple[Text, ...] = Field((), description="Columns with numbers, where rows are no images.")
    text: Text | tuple[Text, Text] | None = Field(
        None,
        description="Column with text; classification: or a pair of columns; token-classification: lists of words.",
    )
    messages: Text | None = Field(None, description="Column with chats: lists of {role, content}.")
    prompt: Text | None = Field(None, description="Column with what is given, together with `completion`.")
    completion: Text | None = Field(None, description="Column with what is learnt, after `prompt`.")
    tokenizer: Text | TrainedTokenizerConfig | None = Field(
        None, description="Hub name or folder, or {train: SIZE}; left out: the student's own."
    )
    chat_template: Text | None = Field(
        None, description="Jinja file that writes a chat as text; left out: the tokeniser's own."
    )
    max_length: int = Field(512, ge=2, le=2**20, description="Most tokens of a row.")
    packing: Literal["best_fit", "wrapped", "none"] = Field(
        "best_fit",
        description="language-model: documents that fit share a row; `wrapped`: all joined and cut; `none`: one a row, cut "
        "off. Chats and completions are cut off, never split: `wrapped` keeps them whole in their order.",
    )
    markov: MarkovConfig | None = Field(None, description="The language of `path: markov`.")
    stream: bool = Field(False, description="language-model: read training rows as they come, by windows.")
    window: Rows | None = Field(
        None, description="stream: documents that are packed and shuffled together; left out: 10000."
    )
    epoch_rows: Rows | None = Field(None, description="stream: rows that count as an epoch.")
    target: str | tuple[Text, ...] | None = Field(
        None, description="Column with the label; several 0/1 columns for several labels a row."
    )
    columns: tuple[Text, ...] = Field((), description="Further columns that travel with the batch, by name.")
    train: Text = Field("train", description="Name of the training split.")
    validation: str | Share | Rows | None = Field(
        0.1, description="A split's name, or the share or number of training rows to hold out."
    )
    test: str | Share | Rows | None = Field(
        None,
        description="A split's name, or the share or number of rows to hold out; left out: `test` where it exists.",
    )
    limit: Rows | None = Field(
        None, description="Keep this many training rows (the first of a seeded permutation)."
    )
    imbalance: ImbalanceConfig | None = Field(
        None, description="Make the training rows long-tailed; held-out rows stay as they are."
    )
    evaluation_limit: Rows | None = Field(None, description="Keep this many rows of each evaluation split.")
    noise: float = Field(
        0.0,
        ge=0,
        le=10,
        description="Standard deviation of fixed Gaussian noise on the inputs, in units of their range.",
    )
    label_noise: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of training rows whose class is replaced by another; held-out rows keep theirs.",
    )
    label_noise_classes: tuple[ClassId, ...] = Field(
        (), description="Classes whose rows alone get another label, one of these; left out: all classes."
    )
    seed: int = Field(0, ge=0, description="Seed of splits, limits and noise.")
    views: tuple[ViewConfig, ...] = Field((), description="Random changes of training rows, in order.")
    view_seed: int | None = Field(
        None, ge=0, le=2**31 - 1, description="Seed of the views; left out: train.seed. One store serves one."
    )
    distinct_views: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="Views of a row, shown in turn; left out: a new one every epoch.",
    )
    image_size: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="Side that images are resized to; left out: as they are, and all alike.",
    )
    workers: int = Field(0, ge=0, le=64, description="Loader processes.")

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> list[str]:
        reasons = text_conflicts(values)
        if values["markov"] is not None and values.get("path", "markov") != "markov":
            reasons.append("markov goes with path: markov, a language made on the spot")
        if values["image"] is not None and values["features"]:
            reasons.append("give `image` or `features`, not both: a row is an image or a list of numbers")
        if isinstance(values["label_noise_classes"], tuple) and len(values["label_noise_classes"]) == 1:
            reasons.append(
                "label_noise_classes names one class; a label is replaced by another of them: give two or more"
            )
        return reasons

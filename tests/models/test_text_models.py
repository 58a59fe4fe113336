"""Models that read tokens: heads by task, vocabularies, ids, attention, number formats; there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_text import FAMILIES, OPTIONS, TOKENS, config, packed, padded, text_model

from tutelage.models import BuiltModel, ModelError, Vocabulary, build_model, load_model, save_model
from tutelage.models.hf_config import check_attention
from tutelage.recipe import RecipeError, validate
from tutelage.recipe.schema import ModelConfig, TeacherConfig

transformers = pytest.importorskip("transformers")
HEADS = {"language-model": "LM", "token-classification": "TokenClassification", "classification": "Sequence"}


def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits  # type: ignore[no-any-return]


# --- heads and vocabularies


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("task", HEADS)
def test_the_head_follows_from_the_task(kind: str, task: str) -> None:
    built = text_model(kind, task)
    model: Any = built.module
    assert HEADS[task].replace("LM", "LM" if kind in ("gpt2", "bert") else "CausalLM") in type(model).__name__
    shapes = {"language-model": (2, 12, 128), "token-classification": (2, 12, 3), "classification": (2, 3)}
    inputs = packed() if task == "language-model" else padded()
    assert logits(model, inputs).shape == shapes[task]
    assert (built.description["task"], built.description["outputs"]) == (
        task,
        100 if task == "language-model" else 3,
    )
    assert model.config.use_cache is False


@pytest.mark.parametrize("kind", FAMILIES)
def test_ids_are_the_tokenisers(kind: str) -> None:
    model: Any = text_model(kind).module
    for holder in (model.config, model.generation_config):
        assert (holder.bos_token_id, holder.eos_token_id, holder.pad_token_id) == (1, 2, 3)
    without = build_model(
        config(kind), outputs=100, input_shape=(12,), task="language-model", vocabulary=Vocabulary(100, eos=0)
    )
    named: Any = without.module.config
    assert (named.bos_token_id, named.eos_token_id, named.pad_token_id) == (None, 0, None)


def test_a_vocabulary_is_rounded_up_or_as_the_options_say() -> None:
    def rows(outputs: int, **options: Any) -> int:
        made = config("gpt2", options=options)
        model: Any = build_model(made, outputs=outputs, input_shape=(8,), task="language-model").module
        return model.lm_head.weight.shape[0]  # type: ignore[no-any-return]

    assert [rows(64), rows(65), rows(100, vocab_size=100), rows(100, vocab_size=130)] == [64, 128, 100, 130]
    with pytest.raises(
        ModelError, match=r"vocabulary of 99, the tokeniser has 100 tokens; leave options\.voc"
    ):
        rows(100, vocab_size=99)


def test_a_token_that_pads_and_ends_documents_is_learnt() -> None:
    """Tokenisers often name one token for both; an embedding that is told so would never move its row."""
    vocabulary = Vocabulary(100, eos=0, pad=0)
    built = build_model(
        config("llama"), outputs=100, input_shape=(8,), task="language-model", vocabulary=vocabulary
    )
    model: Any = built.module
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 0
    assert model.get_input_embeddings().weight[0].abs().min() > 0
    model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.logsumexp(-1).sum().backward()
    assert model.get_input_embeddings().weight.grad[0].abs().max() > 0


def test_an_encoder_is_no_language_model_unasked() -> None:
    with pytest.raises(ModelError, match=r"config:bert is an encoder, .* set options\.is_decoder=true"):
        build_model(
            ModelConfig(model="config:bert", options=OPTIONS["bert"]),
            outputs=100,
            input_shape=(8,),
            task="language-model",
        )
    model = text_model("bert").module
    inputs = packed()
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][:, -1] = 4
    torch.testing.assert_close(logits(model, inputs)[:, :-1], logits(model, changed)[:, :-1])


@pytest.mark.parametrize("kind", FAMILIES)
def test_generation_keeps_its_cache(kind: str) -> None:
    model: Any = text_model(kind).module.eval()
    ids = packed()["input_ids"]
    assert model(input_ids=ids).past_key_values is None
    done = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        return_dict_in_generate=True,
    )
    assert done.past_key_values.get_seq_length() == 15
    slow = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        use_cache=False,
    )
    assert torch.equal(done.sequences, slow)


# --- `config:` and options


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("config:lama", {}, "no model type 'lama'; near: llama"),
        ("config:", {}, "names no architecture; write for example config:llama"),
        ("config:llama", {"hiden_size": 32}, "has no option 'hiden_size'; near: hidden_size"),
        ("config:llama", {"architectures": "x"}, "has no option 'architectures'"),
        ("config:llama", {"hidden_size": "wide"}, "hidden_size.* expected int, got str"),
        ("config:llama", {"hidden_size": 33}, r"hidden size \(33\) is not a multiple of"),
        ("config:gpt2", {"hidden_size": 33}, "`embed_dim` must be divisible|does not divide"),
        ("config:llama", {"num_key_value_heads": 3}, "4 is no multiple of num_key_value_heads 3"),
        ("config:llama", {"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be at least 1"),
        ("config:vit", {"hidden_size": 32}, "is a vit, which transformers has no causal language model for"),
        ("cifar:resnet20", {}, "reads no tokens; language-model takes an `hf:` or `config:` model"),
    ],
)
def test_what_cannot_be_built(model: str, options: dict[str, Any], message: str) -> None:
    sizes = OPTIONS.get(model.removeprefix("config:"), {})
    with pytest.raises(ModelError, match=message):
        build_model(
            ModelConfig(model=model, options=sizes | options),
            outputs=100,
            input_shape=(8,),
            task="language-model",
        )


def test_no_published_weights_of_a_type_alone() -> None:
    with pytest.raises(ModelError, match="config:llama has no published weights"):
        build_model(
            config("llama", weights="pretrained"), outputs=100, input_shape=(8,), task="language-model"
        )


def test_weights_depend_on_the_seed_alone() -> None:
    first, same, other = (text_model("llama", seed=seed).module.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_a_smaller_model_of_a_folders_family(tmp_path: Path) -> None:
    """What follows from a size that an option changes is made anew: heads' width, the kinds of layers."""
    save_model(text_model("qwen2"), tmp_path / "teacher")
    options = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
    student = ModelConfig(model=f"hf:{tmp_path / 'teacher'}", options=options)
    model: Any = build_model(student, outputs=100, input_shape=(8,), task="language-model").module
    assert (len(model.model.layers), len(model.config.layer_types)) == (1, 1)
    assert logits(model, packed()).shape == (2, 12, 128)


# --- there and back


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("task", HEADS)
def test_there_and_back(kind: str, task: str, tmp_path: Path) -> None:
    built = text_model(kind, task)
    inputs = packed() if task == "language-model" else padded()
    expected = logits(built.module, inputs)
    save_model(built, tmp_path / "student")
    read = load_model(tmp_path / "student")
    assert torch.equal(logits(read.module, inputs), expected)
    assert read.description == built.description
    assert read.module.config.use_cache is False  # type: ignore[union-attr]
    alone = type(built.module).from_pretrained(tmp_path / "student")  # type: ignore[attr-defined]
    assert torch.equal(
        logits(alone, inputs | ({"use_cache": False} if task == "language-model" else {})), expected
    )
    assert task != "language-model" or alone.config.use_cache is True


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_documents_of_a_packed_row_are_apart(kind: str, attention: str) -> None:
    """By their positions alone."""
    model = text_model(kind, attention=attention).module
    together, ids = logits(model, packed()), packed()["input_ids"]
    for start, end in ((0, 5), (5, 12)):
        alone = {"input_ids": ids[:, start:end], "position_ids": torch.arange(end - start).repeat(2, 1)}
        torch.testing.assert_close(together[:, start:end], logits(model, alone), atol=1e-5, rtol=0)


def test_what_belongs_to_it_appears_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "student"
    save_model(text_model("gpt2"), folder, beside=lambda path: (path / "tokenizer.json").write_text("{}"))
    assert (folder / "tokenizer.json").exists()

    def full(path: Path) -> None:
        (path / "tokenizer.json").write_text("half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        save_model(text_model("gpt2", seed=1), folder, beside=full)
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


@pytest.fixture
def published(tmp_path: Path) -> BuiltModel:
    """As from the hub: a folder with a vocabulary of 128, chat tokens and settings of generation."""
    built = text_model("gpt2", seed=5)
    save_model(built, tmp_path / "published")
    file = tmp_path / "published" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [2, 7], "top_k": 11}))
    return built


@pytest.mark.parametrize("weights", ["pretrained", "folder"])
def test_trained_weights_keep_their_vocabulary_and_generation(
    published: BuiltModel, weights: str, tmp_path: Path
) -> None:
    folder = str(tmp_path / "published")
    given = ModelConfig(model=f"hf:{folder}", weights=weights if weights == "pretrained" else folder)

    def build(outputs: int | None, vocabulary: Vocabulary | None = None) -> Any:
        return build_model(
            given, outputs=outputs, input_shape=(8,), task="language-model", vocabulary=vocabulary
        )

    built = build(90, Vocabulary(90, bos=4, eos=7, pad=9))
    assert torch.equal(logits(built.module, packed()), logits(published.module, packed()))
    generation = built.module.generation_config
    assert (generation.top_k, generation.eos_token_id, generation.pad_token_id) == (11, [2, 7], 9)
    assert (built.module.config.bos_token_id, built.module.config.pad_token_id) == (4, 9)
    assert build(None).description["outputs"] == 128
    with pytest.raises(
        ModelError, match="vocabulary of 128, the tokeniser has 129 tokens; take the tokeniser"
    ):
        build(129)


def test_weights_of_a_type_take_the_vocabulary_of_their_folder(published: BuiltModel, tmp_path: Path) -> None:
    given = config("gpt2", weights=str(tmp_path / "published"))
    model = build_model(given, outputs=50, input_shape=(8,), task="language-model").module
    assert torch.equal(logits(model, packed()), logits(published.module, packed()))


# --- attention and number formats


@pytest.mark.parametrize("kind", FAMILIES)
def test_attention_by_name(kind: str) -> None:
    plain, fused = (text_model(kind, attention=name).module for name in ("eager", "sdpa"))
    assert (plain.config._attn_implementation, fused.config._attn_implementation) == ("eager", "sdpa")  # type: ignore[union-attr]
    torch.testing.assert_close(logits(plain, packed()), logits(fused, packed()), atol=1e-5, rtol=1e-5)


def test_attention_that_an_architecture_or_this_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old(transformers.GPT2LMHeadModel):  # type: ignore[misc,name-defined]
        _supports_sdpa, _supports_flash_attn, _supports_flex_attn = True, False, False

    with pytest.raises(ModelError, match="Old has no attention 'flash_attention_2'; it has eager, sdpa"):
        check_attention("hf:old", Old, "flash_attention_2")
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: False)
    with pytest.raises(ModelError, match="flash_attention_2 needs the package flash-attn"):
        text_model("llama", attention="flash_attention_2")
    with pytest.raises(RecipeError, match="attention"):
        validate(ModelConfig, {"model": "config:llama", "attention": "someone/kernel"})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_in_half_precision(dtype: str, tmp_path: Path) -> None:
    built = text_model("llama", dtype=dtype)
    assert {str(parameter.dtype) for parameter in built.module.parameters()} == {f"torch.{dtype}"}
    save_model(built, tmp_path / "teacher")
    assert next(load_model(tmp_path / "teacher").module.parameters()).dtype == getattr(torch, dtype)
    whole = load_model(tmp_path / "teacher", dtype="float32", attention="eager").module
    assert next(whole.parameters()).dtype == torch.float32
    expected = logits(built.module, packed()).float()
    assert (logits(whole, packed()) - expected).abs().max() < 0.02 * expected.abs().max()


def test_weights_are_float32_whatever_a_folder_says(tmp_path: Path) -> None:
    save_model(text_model("llama", dtype="bfloat16"), tmp_path / "published")
    for weights in (None, "pretrained", str(tmp_path / "published")):
        given = ModelConfig(model=f"hf:{tmp_path / 'published'}", weights=weights)
        model = build_model(given, outputs=100, input_shape=(8,), task="language-model").module
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_images_come_in_float32() -> None:
    options = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    given = ModelConfig(model="config:vit", options=options | {"patch_size": 4}, dtype="bfloat16")
    with pytest.raises(ModelError, match="reads pixel_values, which come in float32"):
        build_model(given, outputs=3, input_shape=(3, 8, 8))
    whole = build_model(
        given.model_copy(update={"dtype": "float32"}), outputs=3, input_shape=(3, 8, 8)
    ).module
    assert whole(torch.randn(2, 3, 8, 8)).logits.shape == (2, 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "timm:resnet10t", "dtype": "bfloat16"}, "dtype only with `hf:` and `config:` models"),
        ({"store": "store", "dtype": "bfloat16"}, "dtype only for a teacher that is a model here"),
        (
            {"endpoint": "http://host", "attention": "sdpa"},
            "attention only for a teacher that is a model here",
        ),
    ],
)
def test_fields_of_a_teacher_that_mean_nothing(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        validate(TeacherConfig, given)
    assert validate(TeacherConfig, {"run": "runs/x", "dtype": "bfloat16"}).dtype == "bfloat16"


def test_a_vocabulary_that_the_options_leave_out_is_the_tokenisers() -> None:
    encoder: Any = text_model("bert", "classification").module
    assert (encoder.config.vocab_size, encoder.config.pad_token_id) == (128, TOKENS.pad)

"""The examples: each runs as a user would run it, learns, and writes nothing; what a host must be told, it is told."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# What the hosts themselves warn of; any other warning is an error.
LIGHTNING = (
    "`isinstance(treespec, LeafSpec)` is deprecated",  # its own code, against this PyTorch
    "Found 5 module(s) in eval mode at the start of training",  # the teacher, as it is meant
)


@pytest.mark.parametrize(
    ("name", "loss", "ignored"),
    [
        ("pytorch_loop", "nkd_loss", ()),
        ("huggingface_trainer", "kd_loss", ()),
        ("lightning_module", "dkd_loss", LIGHTNING),
    ],
)
def test_an_example_learns(
    name: str, loss: str, ignored: tuple[str, ...], repository: Path, tmp_path: Path
) -> None:
    warnings = ["error", *(f"ignore:{message}" for message in ignored)]
    result = subprocess.run(
        [sys.executable, *(f"-W{rule}" for rule in warnings), str(repository / "examples" / f"{name}.py")],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = {who: float(share) for who, share in re.findall(r"^(.+): accuracy (\S+)%$", result.stdout, re.M)}
    assert list(found) == ["teacher", "student alone", f"student with {loss}"], result.stdout
    assert found["teacher"] > 94
    assert found["student alone"] > 80
    assert found[f"student with {loss}"] > 85
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_hugging_face_trainer_averages_over_accumulated_rows(repository: Path, tmp_path: Path) -> None:
    """Ten rows in one micro-batch or in two move the student alike, though its forward accepts num_items_in_batch."""
    from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

    path = repository / "examples" / "huggingface_trainer.py"
    spec = importlib.util.spec_from_file_location("huggingface_trainer", path)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)

    def network() -> torch.nn.Module:
        layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 8}
        config = ViTConfig(image_size=4, patch_size=2, num_channels=1, num_labels=3, **layers)
        model: torch.nn.Module = ViTForImageClassification(config)
        return model

    torch.manual_seed(0)
    teacher, start = network(), network()
    rows = [{"pixel_values": torch.rand(1, 4, 4), "labels": row % 3} for row in range(10)]

    def moved(micro_batches: int) -> torch.Tensor:
        student = network()
        student.load_state_dict(start.state_dict())
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            num_train_epochs=1,
            per_device_train_batch_size=10 // micro_batches,
            gradient_accumulation_steps=micro_batches,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        example.DistillationTrainer(student, arguments, train_dataset=rows, teacher=teacher).train()
        flat = torch.nn.utils.parameters_to_vector
        return flat(student.parameters()) - flat(start.parameters())

    whole, parts = moved(1).detach(), moved(2).detach()
    assert whole.norm() > 0.01
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-6)

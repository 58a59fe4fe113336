"""A loss of tutelage in the Hugging Face Trainer: `compute_loss` adds it, and is a mean.

A ResNet that saw 900 handwritten digits teaches a smaller one that sees only 100 of them. Nothing is downloaded.

    pip install 'tutelage[examples]'
    python examples/huggingface_trainer.py
"""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments, set_seed

from tutelage.functional import kd_loss


class DistillationTrainer(Trainer):
    """A Trainer that adds `kd_loss` from a teacher to the student's own loss."""

    def __init__(self, *args: Any, teacher: torch.nn.Module, **options: Any) -> None:
        super().__init__(*args, **options)
        self.teacher = teacher.to(self.args.device).eval()
        # compute_loss gives a mean over its rows and leaves num_items_in_batch alone. The Trainer must know: it then
        # divides by the accumulation steps itself, which it does not for models that accept num_items_in_batch.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        with torch.no_grad():
            teacher_logits = self.teacher(inputs["pixel_values"]).logits
        loss = outputs.loss + kd_loss(outputs.logits, teacher_logits, temperature=4.0)
        return (loss, outputs) if return_outputs else loss


def resnet(width: int) -> ResNetForImageClassification:
    config = ResNetConfig(
        num_channels=1, num_labels=10, hidden_sizes=[width, 2 * width], depths=[1, 1], layer_type="basic"
    )
    return ResNetForImageClassification(config)


def training(epochs: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir="runs/huggingface",
        num_train_epochs=epochs,
        per_device_train_batch_size=25,
        learning_rate=3e-3,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
    )


def accuracy(trainer: Trainer, rows: list[dict[str, Any]]) -> float:
    predicted = trainer.predict(rows)
    return float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())


def main(epochs: int = 40) -> None:
    set_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # [rows, 1, 8, 8] in [0, 1]
    rows = [{"pixel_values": images[i], "labels": int(digits.target[i])} for i in torch.randperm(len(images))]
    many, few, held_out = rows[:900], rows[:100], rows[900:]
    teacher = Trainer(resnet(32), training(epochs=6), train_dataset=many)
    alone = Trainer(resnet(16), training(epochs), train_dataset=few)
    taught = DistillationTrainer(resnet(16), training(epochs), train_dataset=few, teacher=teacher.model)
    for name, trainer in {"teacher": teacher, "student alone": alone, "student with kd_loss": taught}.items():
        trainer.train()
        print(f"{name}: accuracy {accuracy(trainer, held_out):.1%}")


if __name__ == "__main__":
    main()

"""A loss of tutelage in Lightning: the teacher is a frozen part of the module, and `training_step` adds the loss.

A network that saw 900 handwritten digits teaches a smaller one that sees only 100 of them.

    pip install 'tutelage[examples]'
    python examples/lightning_module.py
"""

from __future__ import annotations

import torch
from lightning import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tutelage.functional import dkd_loss


class Distilled(LightningModule):
    """A classifier that learns from its labels and, where it has a teacher, from the teacher too."""

    def __init__(self, student: nn.Module, teacher: nn.Module | None = None) -> None:
        super().__init__()
        self.student = student
        # As a part of the module the teacher moves to its device, and lies in its checkpoints too.
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, target = batch
        logits = self.student(images)
        loss = F.cross_entropy(logits, target)
        if self.teacher is not None:
            loss = loss + dkd_loss(logits, self.teacher(images), target, beta=2.0)
        return loss

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        images, target = batch
        self.log("accuracy", (self.student(images).argmax(1) == target).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.student.parameters(), lr=0.01)


def fit(module: Distilled, rows: TensorDataset, epochs: int) -> Distilled:
    trainer = Trainer(max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(module, DataLoader(rows, batch_size=25, shuffle=True))
    return module


def accuracy(module: Distilled, rows: TensorDataset) -> float:
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    return trainer.test(module, DataLoader(rows, batch_size=100), verbose=False)[0]["accuracy"]


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def main(epochs: int = 60) -> None:
    seed_everything(0)
    digits = load_digits()
    order = torch.randperm(len(digits.target))
    images = torch.tensor(digits.images, dtype=torch.float32)[order] / 16  # [rows, 8, 8] in [0, 1]
    target = torch.tensor(digits.target)[order]
    many, few = TensorDataset(images[:900], target[:900]), TensorDataset(images[:100], target[:100])
    held_out = TensorDataset(images[900:], target[900:])

    teacher = fit(Distilled(network(256)), many, epochs=20)
    alone = fit(Distilled(network(32)), few, epochs)
    taught = fit(Distilled(network(32), teacher.student), few, epochs)
    for name, model in {"teacher": teacher, "student alone": alone, "student with dkd_loss": taught}.items():
        print(f"{name}: accuracy {accuracy(model, held_out):.1%}")


if __name__ == "__main__":
    main()

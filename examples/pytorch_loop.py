"""A loss of tutelage in a training loop of your own: one line more.

A network that saw 900 handwritten digits teaches a smaller one that sees only 100 of them.

    python examples/pytorch_loop.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.functional import nkd_loss


def train(
    model: nn.Module, images: Tensor, target: Tensor, epochs: int, teacher: nn.Module | None = None
) -> nn.Module:
    """Trains a model on its labels and, where there is a teacher, on what the teacher says too."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(25):
            logits = model(images[rows])
            loss = F.cross_entropy(logits, target[rows])
            if teacher is not None:
                with torch.no_grad():
                    teacher_logits = teacher(images[rows])
                loss = loss + nkd_loss(logits, teacher_logits, target[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, target: Tensor) -> float:
    return float((model(images).argmax(1) == target).float().mean())


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def main(epochs: int = 60) -> None:
    torch.manual_seed(0)
    digits = load_digits()
    order = torch.randperm(len(digits.target))
    images = torch.tensor(digits.images, dtype=torch.float32)[order] / 16  # [rows, 8, 8] in [0, 1]
    target = torch.tensor(digits.target)[order]
    held_out = images[900:], target[900:]

    teacher = train(network(256), images[:900], target[:900], epochs=20)
    alone = train(network(32), images[:100], target[:100], epochs)
    taught = train(network(32), images[:100], target[:100], epochs, teacher)
    for name, model in {"teacher": teacher, "student alone": alone, "student with nkd_loss": taught}.items():
        print(f"{name}: accuracy {accuracy(model, *held_out):.1%}")


if __name__ == "__main__":
    main()

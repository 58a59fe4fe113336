"""Linear probe: how well a linear classifier does on the frozen encoder's features."""

from __future__ import annotations

import torch
from torch import Tensor

from tutelage.engine.loading import Source
from tutelage.engine.views import to_float
from tutelage.methods.dmae.vit import MaskedViT
from tutelage.procedures.run import Run


def probe_accuracy(run: Run, encoder: MaskedViT, train: Source, test: Source) -> float:
    """Test accuracy of a logistic regression on the mean of the last block's patch tokens, standardised by the training
    rows."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    features, target = _features(run, encoder, train)
    classifier.fit(features.numpy(), target.numpy())
    features, target = _features(run, encoder, test)
    return float(classifier.score(features.numpy(), target.numpy()))


def _features(run: Run, encoder: MaskedViT, source: Source) -> tuple[Tensor, Tensor]:
    """Pooled features ``[rows, width]`` and class ids ``[rows]``, without views."""
    tap = encoder.blocks[-1]
    predict = run.predictor(encoder, (tap,))
    features, targets = [], []
    size = run.recipe.evaluation.batch_size
    for start in range(0, len(source), size):
        batch = to_float(source.fetch(range(start, min(start + size, len(source)))).to(run.runtime.device))
        if batch.target is None:
            raise ValueError("a linear probe needs labels; these rows have none (see data.target)")
        tokens = predict(batch).features[tap].float()
        features.append(tokens[:, encoder.prefix_tokens :].mean(1).cpu())
        targets.append(batch.target.cpu())
    return torch.cat(features), torch.cat(targets)

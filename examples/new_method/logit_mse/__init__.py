"""Regression on a teacher's logits."""

CATALOGUE = {"logit_mse": "method:LogitMSE"}

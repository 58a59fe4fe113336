"""Mixup in distillation: partial mixup, and logits divided by their own deviation in place of a temperature."""

CATALOGUE = {"mixkd": "method:MixKD", "mixup": "method:Mixup"}

"""The plain losses that every comparison stands on."""

CATALOGUE = {"none": "method:PlainTraining", "kd": "method:KD", "fitnet": "method:FitNet"}

"""TRG: relations between the patches of a batch, not between its images."""

CATALOGUE = {"trg": "method:TRG"}

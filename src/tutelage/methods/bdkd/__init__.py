"""BD-KD and mutual learning: teacher and student start untrained and learn from each other."""

CATALOGUE = {"bdkd": "method:BDKD", "dml": "method:DML"}

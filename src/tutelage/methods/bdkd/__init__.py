"""Mutual learning: teacher and student start untrained and learn from each other."""

CATALOGUE = {"dml": "method:DML"}

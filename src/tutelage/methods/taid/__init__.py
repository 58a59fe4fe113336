"""TAID: the student's target moves from its own distribution to the teacher's, as fast as the loss falls."""

CATALOGUE = {"taid": "method:TAID"}

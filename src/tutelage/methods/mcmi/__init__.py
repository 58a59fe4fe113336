"""MCMI: a finished teacher is tuned so that its answers within a class differ more, and then teaches by any method."""

CATALOGUE = {"mcmi": "procedure:MCMI"}

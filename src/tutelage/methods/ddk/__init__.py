"""DDK: more text of the domains in which the student is furthest from the teacher."""

CATALOGUE = {"ddk": "method:DDK"}

"""NKD, a normalised logit loss with a teacher, and USKD, soft labels of one's own without one."""

CATALOGUE = {"nkd": "method:NKD", "uskd": "method:USKD"}

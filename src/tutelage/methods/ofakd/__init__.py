"""OFA-KD: exits at the student's stages learn from the teacher's logits alone, whatever family either model is of."""

CATALOGUE = {"ofakd": "method:OFAKD"}

"""DHKD: labels on the student's own head, the teacher's logits on a second one that is dropped."""

CATALOGUE = {"dhkd": "method:DHKD"}

"""ND: the student's feature turned to the teacher's class mean and made as long as the teacher's."""

CATALOGUE = {"nd": "method:ND"}

"""MiniPLM: a corpus is refined once, by what a teacher knows and a small model does not; students train on the rest."""

CATALOGUE = {"miniplm": "procedure:MiniPLM"}

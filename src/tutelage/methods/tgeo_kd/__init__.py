"""TGeo-KD: a small network reads each sample's triangle of student, teacher and truth, and says how far to follow the
teacher there; it learns on held-out data."""

CATALOGUE = {"tgeo_kd": "method:TGeoKD"}

"""The plain losses that every comparison stands on."""

CATALOGUE = {
    "none": "method:PlainTraining",
    "kd": "method:KD",
    "dkd": "logits:DKD",
    "dist": "logits:DIST",
    "fitnet": "method:FitNet",
    "at": "maps:AT",
    "rkd": "relations:RKD",
    "pkt": "relations:PKT",
    "sp": "relations:SP",
    "vid": "vid:VID",
    "crd": "crd:CRD",
    "reviewkd": "reviewkd:ReviewKD",
}

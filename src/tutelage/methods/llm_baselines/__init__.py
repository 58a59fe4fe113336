"""Divergences of next-token distributions, and learning from the teacher's text: the baselines of language models."""

CATALOGUE = {
    "akl": "method:AdaptiveKL",
    "fkl": "method:ForwardKL",
    "jsd": "method:GeneralizedJSD",
    "rkl": "method:ReverseKL",
    "seqkd": "procedure:SeqKD",
    "skl": "method:SkewedForwardKL",
    "srkl": "method:SkewedReverseKL",
    "tvd": "method:TotalVariation",
}

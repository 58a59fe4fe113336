"""SinKD: the outputs of a batch are compared as two clouds of points, by what it costs to move one onto the other."""

CATALOGUE = {"sinkd": "method:SinKD"}

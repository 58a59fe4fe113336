"""tutelage held against its peers, side by side: `make bench`, or ``python -m benchmarks --list``."""

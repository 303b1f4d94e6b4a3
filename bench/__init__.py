"""The figures: what `make bench` measures. Each module here is one of them, and runs alone."""

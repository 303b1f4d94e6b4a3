"""The figures: what `make bench` measures. Each module with a `FIGURE` is one of them.

Never lives here: a claim without the thing it is compared to, measured in the same run.
"""

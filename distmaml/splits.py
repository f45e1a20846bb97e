"""The names of the splits. Their order is part of every task's random stream and of every store's division."""

SPLITS = ("train", "val", "test")
SAMPLES = "samples"
"""The scheme that every store offers without storing it: all classes in each split, their rows divided."""

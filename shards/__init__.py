"""Data at rest: catalogue, split, pack, index, plan, read. Nothing here imports torch at start."""

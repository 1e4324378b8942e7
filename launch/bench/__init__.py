"""Benchmarks: `python -m launch.bench loader`, and the pipelines that ours is measured beside."""

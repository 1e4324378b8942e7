"""The story of a run: checks, epochs, steps."""

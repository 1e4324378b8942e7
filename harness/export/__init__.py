"""Export of a trained classifier: one file that answers as the harness does, without it."""

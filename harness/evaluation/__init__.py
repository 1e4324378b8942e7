"""Predictions of a split, their metrics, and the results that are written."""

"""Batches on the device: read, decode, augment."""

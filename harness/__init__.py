"""Training and evaluation on one device or many."""

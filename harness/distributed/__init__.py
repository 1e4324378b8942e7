"""Ranks and devices: who takes part, what it runs on, who is alive."""

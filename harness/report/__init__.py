"""A finished run for people, from its files alone."""

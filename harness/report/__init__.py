"""The report of a finished run, from its files: page, plots, text, TensorBoard."""

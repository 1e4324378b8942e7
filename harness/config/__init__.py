"""Settings of a run: what they are, how they are read, saved and compared."""

from harness.config.files import (
    DEFAULT_CONFIG,
    RUNTIME_KEYS,
    differences,
    flat,
    load_config,
    read_config,
    to_yaml,
)
from harness.config.sections import Augment, Config, Data, Eval, Model, Optim, Run

__all__ = [
    "DEFAULT_CONFIG",
    "RUNTIME_KEYS",
    "Augment",
    "Config",
    "Data",
    "Eval",
    "Model",
    "Optim",
    "Run",
    "differences",
    "flat",
    "load_config",
    "read_config",
    "to_yaml",
]

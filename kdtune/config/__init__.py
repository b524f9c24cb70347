"""A recipe's settings: a dataclass <- a YAML file <- key=value, strict.

The dataclass is the documentation: the type, the default and the comment behind each field are what
`kdtune run <recipe> --help` prints, and nothing that the dataclass does not name is accepted.
A YAML file cannot import or execute anything, nor read the environment: beside `${other.setting}` it knows
`${asset:<path>}`, the absolute path of a file that ships with kdtune.
"""

from omegaconf import MISSING

from kdtune.config.loading import ASSETS, load, read_yaml, split_overrides, to_yaml
from kdtune.config.schema import Setting, describe, setting

__all__ = ["ASSETS", "MISSING", "Setting", "describe", "load", "read_yaml", "setting", "split_overrides", "to_yaml"]

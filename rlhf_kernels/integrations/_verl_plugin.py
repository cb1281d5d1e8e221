"""verl's entry point, which verl imports and does not call: adds our names to its registries, and replaces none."""

from .verl import register

register()

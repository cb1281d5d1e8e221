"""Rows of published data sets as rows in our fields: a layout is named by `--data_format`, or found by its columns."""

from .base import Format
from .choice import FORMATS, Conversion, conversion

__all__ = ["FORMATS", "Conversion", "Format", "conversion"]

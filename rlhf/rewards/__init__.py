"""Rewards: checkers of a response, the sandbox they run code in, and scoring by reward model and functions."""

from .checkers import BUILT_IN, final_number, json_schema, math_answer, python_code, regex, unit_test

__all__ = ["BUILT_IN", "final_number", "json_schema", "math_answer", "python_code", "regex", "unit_test"]

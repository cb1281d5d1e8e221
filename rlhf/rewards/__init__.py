"""Rewards: checkers of a response, the sandbox they run code in, and scoring by reward model and functions."""

from .checkers import BUILT_IN, json_schema, math_answer, python_code, regex, unit_test
from .final_answer import final_number
from .row_checks import NoReward

__all__ = ["BUILT_IN", "NoReward", "final_number", "json_schema", "math_answer", "python_code", "regex", "unit_test"]

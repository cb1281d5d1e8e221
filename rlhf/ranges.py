"""What values an option takes: its range stands at its definition, and one function checks all of them.

    learning_rate: float = option(2e-5, "Peak learning rate.", at_least(0))

`check` is called where settings are constructed, so that the command, YAML files and Python are refused alike.
"""

import dataclasses
import functools
import math
import numbers
import types
import typing
from dataclasses import dataclass, field

LARGEST_INT = 2**31 - 1


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; `open_low`, `open_high`: without that end; `also`: values beside them."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    also: tuple = ()
    infinite: bool = False

    def holds(self, number) -> bool:
        if number in self.also:
            return True
        if math.isnan(number) or (math.isinf(number) and not self.infinite):
            return False
        above = number > self.low if self.open_low else number >= self.low
        return above and (number < self.high if self.open_high else number <= self.high)

    def __str__(self) -> str:
        if math.isinf(self.high):
            sign = ">" if self.open_low else ">="
            text = "finite" if math.isinf(self.low) else f"{sign} {self.low:g}"
        else:
            text = f"in {'(' if self.open_low else '['}{self.low:g}, {self.high:.10g}{')' if self.open_high else ']'}"
        return " or ".join([text, *(f"{value}" for value in self.also)])


def at_least(low, *, also=()) -> Range:
    return Range(low, also=also)


def above(low, *, also=()) -> Range:
    return Range(low, open_low=True, also=also)


def within(low, high, *, open_low=False, open_high=False) -> Range:
    return Range(low, high, open_low, open_high)


FINITE = Range()
ANY = Range(infinite=True)
SEED = within(0, LARGEST_INT)


class Help(str):
    """An option's help that carries its range: HfArgumentParser takes no other metadata than argparse's arguments."""

    wants: Range | None = None


def option(default, text: str, wants: Range | None = None):
    """A settings field with its one-line help and, for numbers, its range."""
    text = Help(text)
    text.wants = wants
    return field(default=default, metadata={"help": text})


@functools.cache
def options(config_class) -> dict:
    """{name: (the types that the option takes, its range or None)} of a dataclass of settings."""
    hints, inherited = typing.get_type_hints(config_class), getattr(config_class, "inherited_ranges", {})
    found = {}
    for item in dataclasses.fields(config_class):
        if item.init:
            wants = getattr(item.metadata.get("help"), "wants", None) or inherited.get(item.name)
            found[item.name] = alternatives(hints[item.name]), wants
    return found


def alternatives(hint) -> tuple:
    """The members of a union of types; of any other type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def is_numeric(kinds) -> bool:
    """Whether an option of these types is a number, or a list of numbers."""
    return any(kind in (int, float) or {int, float} & set(typing.get_args(kind)) for kind in kinds)


def check(settings) -> None:
    """Raise ValueError for the first option of a dataclass whose value has a wrong type or is out of its range."""
    for name, (kinds, wants) in options(type(settings)).items():
        check_value(name, getattr(settings, name), kinds, wants)


def check_value(name: str, value, kinds, wants: Range | None = None) -> None:
    """Raise ValueError unless `value` is of one of `kinds` and, as a number, in the range `wants`."""
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if value is None and type(None) in kinds:
        return
    choices = [
        choice for kind in kinds if typing.get_origin(kind) is typing.Literal for choice in typing.get_args(kind)
    ]
    if choices and value not in choices and str not in kinds:
        raise ValueError(f"{name}: got {value!r}, wants {listed(choices)}{or_none(kinds)}")
    if kinds[0] is bool and not isinstance(value, bool):
        raise ValueError(f"{name}: got {value!r}, wants true or false{or_none(kinds)}")
    if not is_numeric(kinds) or (isinstance(value, str) and str in kinds):
        return
    whole = int in kinds
    listing = next((kind for kind in kinds if typing.get_origin(kind) is list), None)
    if listing is not None:
        whole = int in typing.get_args(listing)
        if not isinstance(value, (list, tuple)) or not value:
            raise ValueError(f"{name}: got {value!r}, wants a list of numbers{or_none(kinds)}")
    for number in [value] if listing is None else value:
        kind = numbers.Integral if whole else numbers.Real
        right = isinstance(number, kind) and not isinstance(number, bool)
        if not right or (wants and not wants.holds(number)) or (whole and abs(number) > LARGEST_INT):
            raise ValueError(f"{name}: got {value!r}, wants {described(whole, wants)}{or_none(kinds)}")


def check_arguments(wanted: dict, given) -> None:
    """Check those of a function's arguments that `wanted` names: {name: (type, range)}."""
    for name, (kind, wants) in wanted.items():
        if name in given:
            check_value(name, given[name], alternatives(kind), wants)


def described(whole: bool, wants: Range | None) -> str:
    kind = "a whole number" if whole else "a number"
    return f"{kind} {wants}" if wants and str(wants) != "finite" else f"a finite {kind[2:]}" if not whole else kind


def or_none(kinds) -> str:
    return " (or None)" if type(None) in kinds else ""


def listed(choices) -> str:
    *first, last = map(str, choices)
    return f"{', '.join(first)} or {last}" if first else last

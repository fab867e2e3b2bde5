"""config.json and model_config.json, whose missing and impossible entries are errors that name the file."""

import json
import sys
from pathlib import Path

from ._error import ConvertError

MOST = sys.float_info.max


class Settings(dict):
    def __init__(self, entries, path):
        super().__init__(entries)
        self.path = path

    def __missing__(self, key):
        raise ConvertError(f"{self.path}: {key!r} is missing")

    def count(self, key, default=None, most=2**40):
        """A whole number above zero."""
        value = self[key] if default is None else self.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConvertError(f"{self.path}: {key!r} must be a whole number above zero, got {value!r}")
        if value > most:
            raise ConvertError(f"{self.path}: {key!r} must be at most {most}, got {value}")
        return value

    def groups(self, key="num_multi_query_heads"):
        """SAT's number of heads for keys and values; 0, if every head has its own."""
        return self.count(key) if self.get(key) else 0

    def each(self, key):
        """One after the other, of as many as could be told apart."""
        return range(self.count(key, most=10000))

    def square(self, key):
        """The side of [side, side]."""
        sides = self[key]
        if not isinstance(sides, list) or len(sides) != 2 or sides[0] != sides[1]:
            raise ConvertError(f"{self.path}: {key!r} must be two equal numbers, got {sides!r}")
        return Settings({key: sides[0]}, self.path).count(key)

    def listed(self, key):
        """What is listed, nothing if nothing is."""
        return self[key] if isinstance(self.get(key), list) else []

    def section(self, key):
        """What stands below a key, under a name of its own."""
        if not isinstance(self[key], dict):
            raise ConvertError(f"{self.path}: {key!r} must hold an object, got {repr(self[key])[:80]}")
        return Settings(self[key], f"{self.path}, {key}")

    def colours(self, key):
        """A number for each of red, green and blue; 0.5 where nothing is said."""
        value = self.get(key, [0.5] * 3)
        numbers = [v for v in value if isinstance(v, int | float) and abs(v) < MOST] if isinstance(value, list) else []
        if len(numbers) != 3 or value != numbers:
            raise ConvertError(f"{self.path}: {key!r} must be a list of three numbers, got {repr(value)[:80]}")
        return [float(v) for v in numbers]

    def number(self, key, default=None):
        value = self.get(key, default) if default is not None else self[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MOST:
            raise ConvertError(f"{self.path}: {key!r} must be a number above zero, got {repr(value)[:80]}")
        return value

    def tokens(self, key):
        """The number of a token, of several, or None."""
        value = self.get(key)
        if value is not None and any(type(one) is not int for one in (value if isinstance(value, list) else [value])):
            raise ConvertError(f"{self.path}: {key!r} must be the number of a token, or a list of them, got {repr(value)[:80]}")
        return value

    def text(self, key):
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            raise ConvertError(f"{self.path}: {key!r} must be a text, got {repr(value)[:80]}")
        return value

    def divide(self, key, by, default=None):
        whole, parts = self.count(key), self.count(by, default)
        if whole % parts:
            raise ConvertError(f"{self.path}: {key!r} {whole} must be divisible by {by!r} {parts}")
        return whole // parts


def read(path):
    path = Path(path)
    if not path.is_file():
        raise ConvertError(f"{path.parent}: there is no {path.name}")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # what json and the decoder raise
        raise ConvertError(f"{path}: not JSON: {error}") from None
    if not isinstance(entries, dict):
        raise ConvertError(f"{path}: must hold an object, got a {type(entries).__name__}")
    return Settings(entries, path)


def write(path, entries):
    path.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")

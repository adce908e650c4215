"""Configs as dataclasses: what a field accepts, where its value comes from, and TOML in both directions.

Precedence: flag > FASTDIFF_<FIELD> variable > --config TOML > preset of the base's family > default of the field.
"""

import json
import math
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from fastdiff.runtime import text_file
from fastdiff.runtime.errors import UsageError, as_field

ENV_PREFIX = "FASTDIFF_"
NONE = "none"  # TOML has no null: what an optional field says for None, in files, variables and flags
BOOLS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
EXPECTED = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class Range:
    """What numbers a field accepts: a note beside its help, `Annotated[int, "optimiser steps", Range(1)]`."""

    low: float | None = None
    high: float | None = None
    above: float | None = None  # exclusive
    below: float | None = None  # exclusive
    multiple_of: int | None = None

    def __contains__(self, value: float) -> bool:
        return not (
            (self.low is not None and value < self.low)
            or (self.high is not None and value > self.high)
            or (self.above is not None and value <= self.above)
            or (self.below is not None and value >= self.below)
            or (self.multiple_of is not None and value % self.multiple_of)
        )

    def __str__(self) -> str:
        words = dict(above=self.above, low=self.low, high=self.high, below=self.below, multiple_of=self.multiple_of)
        names = dict(low="at least", high="at most", multiple_of="a multiple of")
        text = lambda bound: f"{bound}" if isinstance(bound, int) else f"{bound:g}"
        return " and ".join(f"{names.get(word, word)} {text(bound)}" for word, bound in words.items() if bound is not None)


@dataclass(frozen=True)
class Option:
    """One field of a config, as the command line and TOML see it."""

    name: str
    kind: type  # str, int, float or bool; of the items where `repeated`
    default: Any  # MISSING where the field must be given
    optional: bool = False  # None is a value
    repeated: bool = False
    choices: tuple[Any, ...] = ()
    range: Range = Range()
    help: str = ""
    flags: tuple[str, ...] = ()  # short forms
    panel: str = "Options"
    argument: bool = False  # named by its place on the command line

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return ENV_PREFIX + self.name.upper()


def options(cls: type) -> list[Option]:
    """The fields of a config class in order, without those in its `WITHOUT`; a type that no flag can carry raises TypeError."""
    hints, without = get_type_hints(cls, include_extras=True), getattr(cls, "WITHOUT", ())  # a config may be any dataclass
    return [_option(cls, f, hints[f.name]) for f in fields(cls) if f.init and f.name not in without]


def _option(cls: type, field: Any, hint: Any) -> Option:
    note, bounds = "", Range()
    if get_origin(hint) is Annotated:
        hint, *notes = get_args(hint)
        note = next((n for n in notes if isinstance(n, str)), "")
        bounds = next((n for n in notes if isinstance(n, Range)), bounds)
    optional = repeated = False
    if get_origin(hint) in {Union, UnionType}:
        inner = [a for a in get_args(hint) if a is not NoneType]
        optional, hint = len(inner) < len(get_args(hint)), inner[0] if len(inner) == 1 else hint
    if get_origin(hint) is list:
        repeated, hint = True, get_args(hint)[0]
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    kind = type(choices[0]) if choices else hint
    if kind not in EXPECTED:
        raise TypeError(f"{cls.__qualname__}.{field.name}: {hint} cannot be a flag")
    # The first class to declare a field names its panel: a new default does not move the flag elsewhere.
    owner = next(c for c in reversed(cls.__mro__) if field.name in c.__dict__.get("__annotations__", {}))
    panel = owner.__dict__.get("PANEL") or ("Options" if owner is cls else "Training")
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    flags = tuple(field.metadata.get("flags", ()))
    argument = bool(field.metadata.get("argument"))
    return Option(field.name, kind, default, optional, repeated, choices, bounds, note, flags, panel, argument)


def suggestion(word: str, known: list[str]) -> str:
    """A hint for a misspelt word, empty where nothing is close."""
    close = get_close_matches(word, known, n=1)
    return f"did you mean {close[0]}?" if close else ""


def coerce(option: Option, value: Any, where: str, *, text: bool) -> Any:
    """The value as the field's type, or UsageError naming `where`; `text` reads strings, else types are TOML's."""
    if option.optional and (value is None or (value == NONE and NONE not in option.choices)):
        return None
    if not option.repeated:
        return _scalar(option, value, where, text)
    if text and isinstance(value, str):
        value = [line for line in value.splitlines() if line]  # commas and colons occur in prompts and paths
    if not isinstance(value, list | tuple):
        raise UsageError(f"{where}: {value!r} is not a list")
    return [_scalar(option, item, where, text) for item in value]


def _scalar(option: Option, value: Any, where: str, text: bool) -> Any:
    for choice in option.choices:
        if choice == value or (text and str(choice) == value):
            return choice
    if option.choices:
        _bad_choice(option, value, where)
    number = _typed(option.kind, value, text)
    if number is None or (isinstance(number, float) and not math.isfinite(number)):
        raise UsageError(f"{where}: {value!r} is not {EXPECTED[option.kind]}")
    if option.kind in {int, float} and number not in option.range:
        subject = as_field(option.name, value) if where == as_field(option.name) else f"{where} {value}"
        raise UsageError(f"{subject}: must be {option.range}")
    return number


def _typed(kind: type, value: Any, text: bool) -> Any:
    """The value as that type; None where it is not one."""
    if kind in {str, bool} and isinstance(value, kind):
        return value
    if text and isinstance(value, str):
        try:
            return BOOLS[value.strip().lower()] if kind is bool else kind(value)
        except (ValueError, KeyError):
            return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        if kind is float:
            return float(value)
        if kind is int and (isinstance(value, int) or value.is_integer()):
            return int(value)
    return None


def _bad_choice(option: Option, value: Any, where: str) -> NoReturn:
    known = [str(c) for c in option.choices]
    raise UsageError(f"{where}: {value!r} is not one of {', '.join(known)}", suggestion(str(value), known))


def from_toml(cls: type, text: str, *, source: str = "config") -> dict[str, Any]:
    """The checked values of a TOML text, for `cls(**values)`; `source` (a file) is named in errors."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{source}: not valid TOML: {error}") from error
    known = {o.name: o for o in options(cls)}
    values = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in known:
            raise UsageError(f"{source}: unknown key {key!r}", suggestion(name, list(known)))
        values[name] = coerce(known[name], value, f"{source}: {key}", text=False)
    return values


def to_toml(config: Any) -> str:
    """All fields of a config, one a line; `from_toml` reads back the same values."""
    return "".join(f"{o.name} = {_literal(vars(config)[o.name])}\n" for o in options(type(config)))


def _literal(value: Any) -> str:
    if value is None:
        return f'"{NONE}"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_literal(v) for v in value)}]"
    if isinstance(value, str):
        # JSON's escapes are TOML's too, but for surrogate pairs (so no ensure_ascii) and DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def read_file(cls: type, path: Path) -> dict[str, Any]:
    """The checked values of a TOML file, the one that the command line calls `config`."""
    source = as_field("config", path)
    try:
        text, kinds = text_file.read(path)
    except OSError as error:
        raise UsageError(f"{source}: {(error.strerror or str(error)).lower()}") from error
    except text_file.NotText as error:
        raise UsageError(f"{source}: {error}", "save it as UTF-8") from error
    text_file.tell(source, kinds)
    return from_toml(cls, text, source=source)


def resolve(
    cls: type,
    flags: Mapping[str, Any] | None = None,
    *,
    file: Path | None = None,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    family_of: Callable[[Mapping[str, Any]], str] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Any:
    """Build a config from all its sources; a flag of None was not given, an empty variable is not set.

    `family_of` names the family of the base that values (with `base` among them) tell, whose preset applies; where the class
    names a field as its VARIANT, the row `family:value` of that field lies over it. Raises UsageError.
    """
    known = options(cls)
    environ = os.environ if environ is None else environ
    values = read_file(cls, file) if file else {}
    for o in known:
        if environ.get(o.variable):
            values[o.name] = coerce(o, environ[o.variable], o.variable, text=True)
        if flags and flags.get(o.name) is not None:
            values[o.name] = coerce(o, flags[o.name], as_field(o.name), text=True)
    base = next((o for o in known if o.name == "base"), None)
    if presets and family_of and base:
        family = family_of({"base": base.default, **values})
        row = preset(known, presets, family)
        if variant := getattr(cls, "VARIANT", None):  # a config may be any dataclass, and few have variants
            default = next(o.default for o in known if o.name == variant)
            chosen = {variant: default, **row, **values}[variant]
            row |= preset(known, presets, f"{family}:{chosen}")
        values = {**row, **values}
    for o in known:
        if o.default is MISSING and o.name not in values:
            hint = f"give {'it' if o.argument else 'the flag'}, {o.variable} or {o.name} in a `config` file"
            raise UsageError(f"{o.name.upper() if o.argument else as_field(o.name)} is required", hint)
    return cls(**values)


def preset(known: list[Option], presets: Mapping[str, Mapping[str, Any]], family: str) -> dict[str, Any]:
    """A family's row of a preset table, checked like a file's."""
    by_name = {o.name: o for o in known}
    row = presets.get(family, {})
    assert set(row) <= set(by_name), f"PRESETS[{family!r}] names no field: {sorted(set(row) - set(by_name))}"
    return {k: coerce(by_name[k], v, f"PRESETS[{family!r}]: {k}", text=False) for k, v in row.items()}

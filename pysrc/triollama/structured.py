"""Typed answers: a type becomes a grammar that the answer must match, the answer its value.

``msgspec`` describes types (``msgspec.inspect``) and decodes JSON; between them stands a grammar in
GBNF that allows the JSON texts of the type and nothing else. The grammar is made from the type
itself, not from its JSON schema: a schema forgets the types of a mapping's keys, and what a string
without a time zone stands for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

import msgspec
from msgspec import inspect

from .errors import AnswerError, ParameterError, UnsupportedError
from .params import GenerationParams

__all__ = ["Structured", "structured"]

T = TypeVar("T")

DIGITS = 20
"""Digits of an integer that has no limits."""

MAX_LENGTH = 20_000
"""Largest limit of a length. A grammar of so many counted elements is read in milliseconds."""

_RULES = {
    "value": 'object | array | string | number | "true" | "false" | "null"',
    "object": '"{" (string colon value (comma string colon value)*)? "}"',
    "array": '"[" (value (comma value)*)? "]"',
    "comma": '"," " "?',
    "colon": '":" " "?',
    "string": '"\\"" char* "\\""',
    # A code point: itself, or escaped; of surrogates whole pairs alone.
    "char": (
        '[^"\\\\\\x00-\\x1F] | "\\\\" (["\\\\/bfnrt]'
        ' | "u" ([0-9a-cA-CefEF] hex{3} | [dD] [0-7] hex{2}'
        ' | [dD] [89abAB] hex{2} "\\\\u" [dD] [c-fC-F] hex{2}))'
    ),
    "hex": "[0-9a-fA-F]",
    "boolean": '"true" | "false"',
    "integer": f'"-"? ("0" | [1-9] [0-9]{{0,{DIGITS - 1}}})',
    "fraction": '"." [0-9]{1,25}',
    # With an exponent one digit stands before the point, so that nothing is too large for a float.
    "number": (
        '"-"? (("0" | [1-9] [0-9]{0,19}) fraction? | [0-9] fraction? [eE] ("-" [0-9]{1,3} | "+"?'
        ' ([0-9]{1,2} | [12] [0-9]{2} | "30" [0-7]))'
        ' | "1" ("." [0-6] [0-9]{0,16})? [eE] "+"? "308")'
    ),
    "year": '[1-9] [0-9]{3} | "0" [1-9] [0-9]{2} | "00" [1-9] [0-9] | "000" [1-9]',
    "leap": (
        '[0-9]{2} ("0" [48] | [2468] [048] | [13579] [26])'
        ' | ("0" [48] | [2468] [048] | [13579] [26]) "00"'
    ),
    "day": (
        'year "-" (("0" [13578] | "1" [02]) "-" ("0" [1-9] | [12] [0-9] | "3" [01])'
        ' | ("0" [469] | "11") "-" ("0" [1-9] | [12] [0-9] | "30")'
        ' | "02-" ("0" [1-9] | "1" [0-9] | "2" [0-8])) | leap "-02-29"'
    ),
    "clock": '([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("." [0-9]{1,6})?',
    "zone": '"Z" | [+-] ([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9]',
    "duration": ('"\\"" "-"? "P" ([0-9]{1,9} "D" ("T" seconds)? | "T" seconds) "\\""'),
    "seconds": '[0-9]{1,5} ("." [0-9]{1,6})? "S"',
    "uuid": '"\\"" hex{8} "-" hex{4} "-" hex{4} "-" hex{4} "-" hex{12} "\\""',
    "decimal": (
        '"\\"" "-"? ("0" | [1-9] [0-9]{0,19}) ("." [0-9]{1,20})? ([eE] [+-]? [0-9]{1,3})? "\\""'
    ),
    "base64": '"\\"" (sixbits{4})* (sixbits{2} "==" | sixbits{3} "=")? "\\""',
    "sixbits": "[A-Za-z0-9+/]",
}


class Structured(Generic[T]):
    """A type, as grammar and decoder. Made by ``structured``.

    ``into``: the type. ``grammar``: GBNF of the JSON texts of its values.
    """

    def __init__(self, into: type[T]) -> None:
        self.into = into
        self.grammar = _Writer().write(into)
        self._decoder = msgspec.json.Decoder(into)

    def constrain(self, params: GenerationParams) -> GenerationParams:
        """``params`` with the grammar. ParameterError if they have one, or forbid ending."""
        if params.grammar is not None:
            raise ParameterError(
                "into= brings a grammar of its own; leave `grammar` None",
                parameter="grammar",
                value=params.grammar,
            )
        if params.ignore_eos:
            raise ParameterError(
                "into= needs an end; leave `ignore_eos` False", parameter="ignore_eos", value=True
            )
        return params.replace(grammar=self.grammar)

    def parse(self, text: str, finish_reason: str = "") -> T:
        """The value in an answer. Raises AnswerError if there is none, as in one that was cut."""
        try:
            return self._decoder.decode(text)
        except (msgspec.MsgspecError, ValueError, TypeError, RecursionError) as error:
            why = str(error) or type(error).__name__
            raise AnswerError(
                f"the answer is no {_name(self.into)}: {why}"
                + (f" (it ended by {finish_reason!r})" if finish_reason else ""),
                text=text,
                finish_reason=finish_reason,
            ) from error


def structured(into: type[T]) -> Structured[T]:
    """``into`` as grammar and decoder: a Struct, dataclass, TypedDict, or any type msgspec knows.

    Honoured: required and optional fields (in their order), tags and unions, recursion, enums and
    literals, lengths of strings, arrays and mappings up to 20,000, limits of integers (else 20
    digits), whole-number limits of floats, dates, times, durations, UUIDs, decimals, base64.
    Raises UnsupportedError, naming the place, for patterns, multiples, other limits of floats,
    lengths of bytes, and custom types; ParameterError for what is no type.
    """
    try:
        return _cached(into)  # type: ignore[arg-type]
    except TypeError:  # not hashable
        return Structured(into)


@functools.lru_cache(maxsize=64)
def _cached(into: Any) -> Structured[Any]:
    return Structured(into)


def _name(into: Any) -> str:
    return getattr(into, "__name__", None) or str(into)


def _literal(text: str) -> str:
    """``text`` as a GBNF string."""
    escaped = "".join(
        f"\\x{ord(c):02x}" if ord(c) < 32 else {'"': '\\"', "\\": "\\\\"}.get(c, c) for c in text
    )
    return f'"{escaped}"'


class _Writer:
    """Rules of one grammar."""

    def __init__(self) -> None:
        self._rules: dict[str, str] = {}
        self._named: dict[int, str] = {}
        self._kept: list[inspect.Type] = []  # so that ids stay their own
        self._count = 0

    def write(self, into: Any) -> str:
        try:
            info = inspect.type_info(into)
        except (TypeError, ValueError, NameError) as error:
            raise ParameterError(
                f"into={into!r} is no type that msgspec decodes: {error}",
                parameter="into",
                value=into,
            ) from None
        root = self._type(info, "$")
        rules = {"root": root, **self._rules}
        waiting = list(rules.values())
        while waiting:  # what the rules refer to
            for name, body in _RULES.items():
                if name not in rules and _refers(waiting[-1], name):
                    rules[name] = body
                    waiting.insert(0, body)
            waiting.pop()
        return "".join(f"{name} ::= {body}\n" for name, body in rules.items())

    def _rule(self, body: str) -> str:
        """A name for ``body``."""
        for name, known in self._rules.items():
            if known == body:
                return name
        self._count += 1
        name = f"r{self._count}"
        self._rules[name] = body
        return name

    def _item(self, info: inspect.Type, place: str) -> str:
        """One name that stands for a type."""
        body = self._type(info, place)
        return body if body.isalnum() else self._rule(body)

    def _type(self, info: inspect.Type, place: str) -> str:
        if isinstance(info, inspect.Metadata):
            return self._type(info.type, place)
        simple = _SIMPLE.get(type(info))
        if simple is not None:
            return simple
        handler = _HANDLERS.get(type(info))
        if handler is None:
            raise UnsupportedError(f"into: {place} is of a type without a grammar: {info}")
        return handler(self, info, place)

    # Numbers and strings

    def _integer(self, info: inspect.IntType, place: str) -> str:
        if info.multiple_of is not None:
            raise UnsupportedError(f"into: {place} has multiple_of, which grammars cannot count")
        low, high = _int_limits(info, place)
        if low is None and high is None:
            return "integer"
        most = 10**DIGITS - 1
        low, high = -most if low is None else low, most if high is None else high
        if max(abs(low), abs(high)) > most or low > high:
            raise UnsupportedError(
                f"into: {place} has the limits {low} to {high}; limits have at most {DIGITS} digits"
            )
        parts = []
        if low < 0:
            parts += [f'"-" ({one})' for one in [_one_of(_digits(max(1, -high), -low))]]
        if high >= 0:
            parts += _digits(max(0, low), high)
        return _one_of(parts)

    def _float(self, info: inspect.FloatType, place: str) -> str:
        if info.multiple_of is not None:
            raise UnsupportedError(f"into: {place} has multiple_of, which grammars cannot count")
        limits = (info.gt, info.ge, info.lt, info.le)
        if all(limit is None for limit in limits):
            return "number"
        if any(limit is not None and limit != int(limit) for limit in limits):
            raise UnsupportedError(
                f"into: {place} has a limit that is no whole number; check it after decoding"
            )
        low, low_open = _tighter(info.ge, info.gt, max)
        high, high_open = _tighter(info.le, info.lt, min)
        parts: list[str] = []
        # Down from zero, mirrored, then up.
        if low is None or low < 0:
            least, open_ = (-high, high_open) if high is not None and high <= 0 else (0, True)
            most = None if low is None else -low
            parts += [f'"-" ({one})' for one in _reals(least, open_, most, low_open)]
        if high is None or high >= 0:
            least, open_ = (low, low_open) if low is not None and low >= 0 else (0, False)
            parts += _reals(least, open_, high, high_open)
        if not parts:
            raise UnsupportedError(f"into: the limits of {place} leave no number")
        return _one_of(parts)

    def _string(self, info: inspect.StrType, place: str) -> str:
        if info.pattern is not None:
            raise UnsupportedError(
                f"into: {place} has a pattern, for which there is no grammar; use lengths, a "
                "Literal, or check it after decoding"
            )
        if info.min_length is None and info.max_length is None:
            return "string"
        times = _times(info.min_length or 0, info.max_length, place)
        return f'"\\"" char{times} "\\""'

    def _bytes(self, info: Any, place: str) -> str:
        if info.min_length is not None or info.max_length is not None:
            raise UnsupportedError(f"into: {place} limits the length of bytes")
        return "base64"

    def _date_time(self, info: inspect.DateTimeType, place: str) -> str:
        return f'"\\"" day "T" clock{_zone(info.tz)} "\\""'

    def _time(self, info: inspect.TimeType, place: str) -> str:
        return f'"\\"" clock{_zone(info.tz)} "\\""'

    # Choices

    def _literals(self, info: inspect.LiteralType, place: str) -> str:
        return _one_of([_literal(_encoded(value)) for value in info.values])

    def _enum(self, info: inspect.EnumType, place: str) -> str:
        return _one_of([_literal(_encoded(value)) for value in info.cls])

    def _union(self, info: inspect.UnionType, place: str) -> str:
        if any(isinstance(one, inspect.RawType) for one in info.types):
            raise UnsupportedError(f"into: {place} has Raw in a union; msgspec decodes none such")
        return _one_of([self._item(one, place) for one in info.types])

    # Containers

    def _sequence(self, info: inspect.CollectionType, place: str) -> str:
        item = self._item(info.item_type, f"{place}[...]")
        return f'"[" {_several(item, info.min_length or 0, info.max_length, place)} "]"'

    def _set(self, info: inspect.SetType | inspect.FrozenSetType, place: str) -> str:
        if not _is_hashable(info.item_type):
            raise UnsupportedError(
                f"into: {place} is a set of what cannot be in a set: {info.item_type}"
            )
        return self._sequence(info, place)

    def _tuple(self, info: inspect.TupleType, place: str) -> str:
        items = [self._item(one, f"{place}[{at}]") for at, one in enumerate(info.item_types)]
        return _array(items, len(items))

    def _mapping(self, info: inspect.DictType, place: str) -> str:
        value = self._item(info.value_type, f"{place}[...]")
        key = self._key(info.key_type, f"{place}[...]")
        item = self._rule(f"{key} colon {value}")
        return f'"{{" {_several(item, info.min_length or 0, info.max_length, place)} "}}"'

    def _key(self, info: inspect.Type, place: str) -> str:
        if isinstance(info, inspect.Metadata):
            return self._key(info.type, place)
        if isinstance(info, inspect.AnyType):
            return "string"
        if isinstance(info, inspect.UnionType):
            return self._rule(_one_of([self._key(one, place) for one in info.types]))
        if isinstance(info, inspect.IntType | inspect.FloatType):
            return self._rule(f'"\\"" ({self._type(info, place)}) "\\""')
        if isinstance(info, inspect.EnumType | inspect.LiteralType):
            values = info.cls if isinstance(info, inspect.EnumType) else info.values
            quoted = [_encoded(value) for value in values]
            quoted = [one if one.startswith('"') else f'"{one}"' for one in quoted]
            return self._rule(_one_of([_literal(one) for one in quoted]))
        if isinstance(info, _TEXTUAL):
            return self._item(info, place)
        raise UnsupportedError(f"into: the keys of {place} cannot be written as strings: {info}")

    # Fields

    def _object(self, info: Any, place: str) -> str:
        name = self._begin(info)
        if name is not None:
            return name
        fields: list[tuple[str, str, bool]] = []
        if getattr(info, "tag_field", None) is not None:
            fields.append((info.tag_field, _literal(_encoded(info.tag)), True))
        for field in info.fields:
            item = self._item(field.type, f"{place}.{field.encode_name}")
            fields.append((field.encode_name, item, field.required))
        if getattr(info, "array_like", False):
            n_required = max((at + 1 for at, one in enumerate(fields) if one[2]), default=0)
            return self._end(info, _array([item for _, item, _ in fields], n_required))
        # first: what may follow where nothing was written yet; rest: where something was.
        first, rest = "", ""
        for key, item, required in reversed(fields):
            member = f"{_literal(_encoded(key))} colon {item}"
            after = f" {rest}" if rest else ""
            both = f"{member}{after}"
            if required:
                first, rest = self._rule(both), self._rule(f"comma {both}")
            else:
                first = self._rule(f"{both} | {first}" if first else f"({both})?")
                rest = self._rule(f"(comma {member})?{after}")
        return self._end(info, f'"{{" {first} "}}"' if first else '"{}"')

    def _named_tuple(self, info: inspect.NamedTupleType, place: str) -> str:
        name = self._begin(info)
        if name is not None:
            return name
        items = [self._item(one.type, f"{place}.{one.name}") for one in info.fields]
        required = sum(one.required for one in info.fields)
        return self._end(info, _array(items, required))

    def _begin(self, info: inspect.Type) -> str | None:
        """The rule of a type that was met before, perhaps inside itself."""
        known = self._named.get(id(info))
        if known is None:
            self._kept.append(info)
            self._count += 1
            self._named[id(info)] = f"r{self._count}"
        return known

    def _end(self, info: inspect.Type, body: str) -> str:
        name = self._named[id(info)]
        self._rules[name] = body
        return name


_SIMPLE: dict[type, str] = {
    inspect.AnyType: "value",
    inspect.RawType: "value",
    inspect.NoneType: '"null"',
    inspect.BoolType: "boolean",
    inspect.DateType: '"\\"" day "\\""',
    inspect.TimeDeltaType: "duration",
    inspect.UUIDType: "uuid",
    inspect.DecimalType: "decimal",
}
_HANDLERS: dict[type, Callable[[_Writer, Any, str], str]] = {
    inspect.IntType: _Writer._integer,
    inspect.FloatType: _Writer._float,
    inspect.StrType: _Writer._string,
    inspect.BytesType: _Writer._bytes,
    inspect.ByteArrayType: _Writer._bytes,
    inspect.MemoryViewType: _Writer._bytes,
    inspect.DateTimeType: _Writer._date_time,
    inspect.TimeType: _Writer._time,
    inspect.LiteralType: _Writer._literals,
    inspect.EnumType: _Writer._enum,
    inspect.UnionType: _Writer._union,
    inspect.ListType: _Writer._sequence,
    inspect.SetType: _Writer._set,
    inspect.FrozenSetType: _Writer._set,
    inspect.VarTupleType: _Writer._sequence,
    inspect.CollectionType: _Writer._sequence,
    inspect.TupleType: _Writer._tuple,
    inspect.DictType: _Writer._mapping,
    inspect.StructType: _Writer._object,
    inspect.TypedDictType: _Writer._object,
    inspect.DataclassType: _Writer._object,
    inspect.NamedTupleType: _Writer._named_tuple,
}
_UNHASHABLE = (
    inspect.AnyType,
    inspect.RawType,
    inspect.ListType,
    inspect.SetType,
    inspect.CollectionType,
    inspect.DictType,
    inspect.TypedDictType,
    inspect.ByteArrayType,
)
_TEXTUAL = (
    inspect.StrType,
    inspect.BytesType,
    inspect.DateTimeType,
    inspect.TimeType,
    inspect.DateType,
    inspect.TimeDeltaType,
    inspect.UUIDType,
    inspect.DecimalType,
)


def _refers(body: str, name: str) -> bool:
    """Whether a rule's body names another, outside of its strings and classes."""
    return name in _names(body)


@functools.lru_cache(maxsize=256)
def _names(body: str) -> frozenset[str]:
    found, word, at = set(), "", 0
    while at < len(body):
        c = body[at]
        if c in '"[':
            close = '"' if c == '"' else "]"
            at += 1
            while body[at] != close:
                at += 2 if body[at] == "\\" else 1
        elif c.isalnum():
            word += c
            at += 1
            continue
        if word:
            found.add(word)
            word = ""
        at += 1
    return frozenset({*found, word})


def _is_hashable(info: inspect.Type) -> bool:
    """Whether values of the type can be in a set, as far as the type tells."""
    if isinstance(info, inspect.Metadata):
        return _is_hashable(info.type)
    if isinstance(info, inspect.UnionType):
        return all(map(_is_hashable, info.types))
    if isinstance(info, inspect.TupleType):
        return all(map(_is_hashable, info.item_types))
    if isinstance(info, inspect.VarTupleType):
        return _is_hashable(info.item_type)
    if isinstance(info, inspect.StructType):
        config = info.cls.__struct_config__
        return config.frozen or not config.eq
    if isinstance(info, inspect.DataclassType):
        hashed: object = info.cls.__hash__
        return hashed is not None
    return type(info) not in _UNHASHABLE


def _encoded(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _one_of(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"({' | '.join(parts)})"


def _zone(tz: bool | None) -> str:
    return {None: " zone?", True: " zone", False: ""}[tz]


def _times(low: int, high: int | None, place: str) -> str:
    if max(low, high or 0) > MAX_LENGTH:
        raise UnsupportedError(
            f"into: {place} has a length of {max(low, high or 0)}; grammars count to {MAX_LENGTH}"
        )
    if high is not None and high < low:
        raise UnsupportedError(f"into: no length of {place} is from {low} to {high}")
    return f"{{{low},{'' if high is None else high}}}"


def _several(item: str, low: int, high: int | None, place: str) -> str:
    """``item``, so many times, with commas between."""
    _times(low, high, place)
    if high == 0:
        return '""'
    more = _times(max(0, low - 1), None if high is None else high - 1, place)
    body = f"{item} (comma {item}){more}"
    return body if low else f"({body})?"


def _array(items: Sequence[str], n_required: int) -> str:
    """An array of these, of which the last may be missing."""
    tail = ""
    for at in range(len(items) - 1, -1, -1):
        body = (f"comma {items[at]}" if at else items[at]) + tail
        tail = f" {body}" if at < n_required else f" ({body})?"
    return f'"["{tail} "]"'


def _int_limits(info: inspect.IntType, place: str) -> tuple[int | None, int | None]:
    lows = [one for one in (info.ge, None if info.gt is None else info.gt + 1) if one is not None]
    highs = [one for one in (info.le, None if info.lt is None else info.lt - 1) if one is not None]
    return (max(lows) if lows else None), (min(highs) if highs else None)


def _tighter(
    closed: float | None, opened: float | None, tighter: Callable[[Iterable[float]], float]
) -> tuple[int | None, bool]:
    """The limit that counts, and whether it is itself left out."""
    both = [one for one in (closed, opened) if one is not None]
    if not both:
        return None, False
    limit = tighter(both)
    return int(limit), opened is not None and limit == opened


def _digits(low: int, high: int) -> list[str]:
    """Alternatives for the decimal texts of 0 <= low..high."""
    parts: list[str] = []
    while low <= high:
        # The largest block of the form dddXXX (X: any digit) that begins at low.
        power = 0
        while (
            low % 10 ** (power + 1) == 0
            and low + 10 ** (power + 1) - 1 <= high
            and low >= 10 ** (power + 1)
        ):
            power += 1
        head, unit = low // 10**power, 10**power
        last = min(head // 10 * 10 + 9, (high + 1) // unit - 1)
        stem, first = str(head)[:-1], head % 10
        digit = f"[{first}-{last % 10}]" if last > head else f'"{first}"'
        rest = f" [0-9]{{{power}}}" if power else ""
        parts.append((f'"{stem}" ' if stem else "") + digit + rest)
        low = (last + 1) * unit
    return parts


def _reals(low: int, low_open: bool, high: int | None, high_open: bool) -> list[str]:
    """Alternatives for decimal fractions from ``low`` >= 0 to ``high``."""
    most = 10**DIGITS - 1 if high is None else high
    parts: list[str] = []
    if high is not None and low > high:
        return parts
    first = low
    if low < most and low_open:  # beyond low, but before the next whole number
        parts.append(f'"{low}." "0"{{0,16}} [1-9] [0-9]{{0,16}}')
        first = low + 1
    if first < most:
        parts.append(f"{_one_of(_digits(first, most - 1))} fraction?")
    if high is not None and not high_open and not (low == high and low_open):
        parts.append(f'"{high}" ("." "0"{{1,17}})?')
    return parts

"""Grammars of the JSON texts of types.

``msgspec`` describes types (``msgspec.inspect``); the grammar allows the JSON texts of a type and
nothing else. It is made from the type itself, not from its JSON schema: a schema forgets the types
of a mapping's keys, and what a string without a time zone stands for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

import msgspec
from msgspec import inspect

from ..checks import shown
from ..errors import ParameterError, UnsupportedError
from .lark import Lark, literal
from .numbers import DIGITS, integers, reals, tighter
from .sound import check_sound

__all__ = ["Grammar"]

ZERO = Decimal(0)
ZEROS = r"/\.0{1,17}/"

_I64 = 2**63 - 1
_MOST = 2**31 - 1  # of what is counted

_VALUE = {
    "value": "object | array | STRING | NUMBER | TRUE | FALSE | NULL",
    "object": '"{" (STRING COLON value (COMMA STRING COLON value)*)? "}"',
    "array": '"[" (value (COMMA value)*)? "]"',
}
_OF_VALUE = ("STRING", "NUMBER", "TRUE", "FALSE", "NULL", "COMMA", "COLON")


class Grammar(Lark):
    """A grammar that knows types."""

    def __init__(self) -> None:
        super().__init__()
        self._named: dict[int, str] = {}
        self._kept: list[inspect.Type] = []  # so that ids stay their own

    def type(self, into: Any, place: str = "$") -> str:
        """The rule of a type's JSON texts. Raises UnsupportedError, naming the place of what no
        grammar can say; ParameterError for what is no type."""
        try:
            check_sound(into, place)
            info = inspect.type_info(into)
        except (TypeError, ValueError, NameError, RecursionError) as error:
            raise ParameterError(
                f"into={shown(into)} is no type that msgspec decodes: {error}",
                parameter="into",
                value=into,
            ) from None
        return self._type(info, place)

    def item(self, into: Any, place: str) -> str:
        """One name that stands for a type. Raises what ``type`` does."""
        body = self.type(into, place)
        return body if body.isalnum() else self.rule(body)

    def _item(self, info: inspect.Type, place: str) -> str:
        """One name that stands for a type."""
        body = self._type(info, place)
        return body if body.isalnum() else self.rule(body)

    def _type(self, info: inspect.Type, place: str) -> str:
        if isinstance(info, inspect.Metadata):
            return self._type(info.type, place)
        simple = _SIMPLE.get(type(info))
        if simple is not None:
            return self.use(simple)
        handler = _HANDLERS.get(type(info))
        if handler is None:
            raise UnsupportedError(f"into: {place} is of a type without a grammar: {info}")
        return handler(self, info, place)

    def _any(self, info: inspect.Type, place: str) -> str:
        for name in _OF_VALUE:
            self.use(name)
        self._rules.update(_VALUE)
        return "value"

    def _bool(self, info: inspect.Type, place: str) -> str:
        return self.rule(f"{self.use('TRUE')} | {self.use('FALSE')}")

    # Numbers and strings. A terminal, except where llguidance's own JSON schema knows better.

    def _integer(self, info: inspect.IntType, place: str) -> str:
        low, high = _int_limits(info)
        if low is not None and high is not None and low > high:
            raise UnsupportedError(f"into: the limits of {place} leave no number")
        if info.multiple_of is not None:
            return self._multiple(info.multiple_of, low, high, place)
        if low is None and high is None:
            return self.use("INTEGER")
        most = 10**DIGITS - 1
        low, high = -most if low is None else low, most if high is None else high
        if max(abs(low), abs(high)) > most or low > high:
            raise UnsupportedError(
                f"into: {place} has the limits {low} to {high}; limits have at most {DIGITS} digits"
            )
        parts = []
        if low < 0:
            parts.append(f"-({'|'.join(integers(max(1, -high), -low))})")
        if high >= 0:
            parts += integers(max(0, low), high)
        return self.terminal(f"/{'|'.join(parts)}/")

    def _multiple(self, of: float, low: int | None, high: int | None, place: str) -> str:
        if of != int(of) or not 0 < of <= _I64:
            raise UnsupportedError(
                f"into: {place} has multiple_of={of}, and grammars count whole numbers alone"
            )
        schema: dict[str, Any] = {"type": "integer", "multipleOf": int(of)}
        most = 10**18
        low, high = (
            max(-most, -most if low is None else low),
            min(most, most if high is None else high),
        )
        if -(-low // int(of)) * int(of) > high:
            raise UnsupportedError(f"into: the limits of {place} leave no number")
        return self.schema({**schema, "minimum": low, "maximum": high})

    def _float(self, info: inspect.FloatType, place: str) -> str:
        limits = (info.gt, info.ge, info.lt, info.le)
        if any(limit is not None and not math.isfinite(limit) for limit in limits):
            raise UnsupportedError(f"into: {place} has a limit that is no number")
        low, low_open = tighter(info.ge, info.gt, max)
        high, high_open = tighter(info.le, info.lt, min)
        both = low is not None and high is not None
        if both and (low > high or (low == high and (low_open or high_open))):  # type: ignore[operator]
            raise UnsupportedError(f"into: the limits of {place} leave no number")
        if info.multiple_of is not None:
            first = None if low is None else math.floor(low) + 1 if low_open else math.ceil(low)
            last = None if high is None else math.ceil(high) - 1 if high_open else math.floor(high)
            whole = self._multiple(info.multiple_of, first, last, place)
            return self.rule(f"{whole} {self.terminal(ZEROS)}?")
        if low is None and high is None:
            return self.use("NUMBER")
        below, above = (None if one is None else Decimal(repr(one)) for one in (low, high))
        parts: list[str] = []
        # Down from zero, mirrored, then up.
        if below is None or below < 0:
            least, open_ = (-above, high_open) if above is not None and above <= 0 else (ZERO, True)
            parts += [f"-({one})" for one in reals(least, open_, below and -below, low_open)]
        if above is None or above >= 0:
            least, open_ = (below, low_open) if below is not None and below >= 0 else (ZERO, False)
            parts += reals(least, open_, above, high_open)
        return self.terminal(f"/{'|'.join(parts)}/")

    def _string(self, info: inspect.StrType, place: str) -> str:
        low, high = info.min_length or 0, info.max_length
        _check_times(low, high, place)
        if info.pattern is not None:
            schema: dict[str, Any] = {"type": "string", "pattern": info.pattern}
            if low:
                schema["minLength"] = low
            if high is not None:
                schema["maxLength"] = high
            return self.schema(schema)
        if not low and high is None:
            return self.use("STRING")
        if high == 0:  # which llguidance does not count to
            return self.terminal(r'"\"\""')
        self.use("CHAR")
        return self.terminal(rf'"\"" CHAR{_times(low, high)} "\""')

    def _bytes(self, info: Any, place: str) -> str:
        low, high = info.min_length or 0, info.max_length
        _check_times(low, high, place)
        if not low and high is None:
            return self.use("BASE64")
        # Threes of bytes are fours of characters; one byte more, or two, are padded to four.
        parts, sixbits = [], r"[A-Za-z0-9+\/]"
        for more, end in ((0, ""), (1, f"{sixbits}{{2}}=="), (2, f"{sixbits}{{3}}=")):
            least = max(0, -(-(low - more) // 3))
            most = None if high is None else (high - more) // 3
            if most is None or most >= least:
                parts.append(f"({sixbits}{{4}}){_times(least, most)}{end}")
        return self.terminal(f'/"({"|".join(parts)})"/')

    def _date_time(self, info: inspect.DateTimeType, place: str) -> str:
        self.use("DAY")
        self.use("CLOCK")
        return self.terminal(rf'"\"" DAY "T" CLOCK{self._zone(info.tz)} "\""')

    def _time(self, info: inspect.TimeType, place: str) -> str:
        self.use("CLOCK")
        return self.terminal(rf'"\"" CLOCK{self._zone(info.tz)} "\""')

    def _zone(self, tz: bool | None) -> str:
        if tz is False:
            return ""
        self.use("ZONE")
        return " ZONE" if tz else " ZONE?"

    # Choices

    def _literals(self, info: inspect.LiteralType, place: str) -> str:
        return self.terminal(_one_of([literal(_encoded(value)) for value in info.values]))

    def _enum(self, info: inspect.EnumType, place: str) -> str:
        return self.terminal(_one_of([literal(_encoded(value)) for value in info.cls]))

    def _union(self, info: inspect.UnionType, place: str) -> str:
        if any(isinstance(one, inspect.RawType) for one in info.types):
            raise UnsupportedError(f"into: {place} has Raw in a union; msgspec decodes none such")
        for kind, name in _LIMITED.items():
            if sum(isinstance(_bare(one), kind) for one in info.types) > 1:
                raise UnsupportedError(
                    f"into: {place} has {name} twice in one union, and msgspec takes the limits of"
                    f" one for both; write one {name} with the limits that are meant"
                )
        return _one_of([self._item(one, place) for one in info.types])

    # Containers

    def _sequence(self, info: inspect.CollectionType, place: str) -> str:
        item = self._item(info.item_type, f"{place}[...]")
        return f'"[" {self._several(item, info.min_length or 0, info.max_length, place)} "]"'

    def _set(self, info: inspect.SetType | inspect.FrozenSetType, place: str) -> str:
        if not _is_hashable(info.item_type):
            raise UnsupportedError(
                f"into: {place} is a set of what cannot be in a set: {info.item_type}"
            )
        return self._sequence(info, place)

    def _tuple(self, info: inspect.TupleType, place: str) -> str:
        items = [self._item(one, f"{place}[{at}]") for at, one in enumerate(info.item_types)]
        return self._array(items, len(items))

    def _mapping(self, info: inspect.DictType, place: str) -> str:
        value = self._item(info.value_type, f"{place}[...]")
        key = self._key(info.key_type, f"{place}[...]")
        item = self.rule(f"{key} {self.use('COLON')} {value}")
        return f'"{{" {self._several(item, info.min_length or 0, info.max_length, place)} "}}"'

    def _key(self, info: inspect.Type, place: str) -> str:
        if isinstance(info, inspect.Metadata):
            return self._key(info.type, place)
        if isinstance(info, inspect.AnyType):
            return self.use("STRING")
        if isinstance(info, inspect.UnionType):
            return self.rule(_one_of([self._key(one, place) for one in info.types]))
        if isinstance(info, inspect.IntType | inspect.FloatType):
            number = self._type(info, place)
            if number in self._terminals:
                return self.terminal(rf'"\"" {number} "\""')
        if isinstance(info, inspect.EnumType | inspect.LiteralType):
            values = info.cls if isinstance(info, inspect.EnumType) else info.values
            quoted = [_encoded(value) for value in values]
            quoted = [one if one.startswith('"') else f'"{one}"' for one in quoted]
            return self.terminal(_one_of([literal(one) for one in quoted]))
        if isinstance(info, _TEXTUAL):
            return self._item(info, place)
        raise UnsupportedError(f"into: the keys of {place} cannot be written as strings: {info}")

    def _several(self, item: str, low: int, high: int | None, place: str) -> str:
        """``item``, so many times, with commas between."""
        _check_times(low, high, place)
        if high == 0:
            return '""'
        body = item
        if high != 1:
            more = _times(max(0, low - 1), None if high is None else high - 1)
            body = f"{item} ({self.use('COMMA')} {item}){more}"
        return body if low else f"({body})?"

    def _array(self, items: Sequence[str], n_required: int) -> str:
        """An array of these, of which the last may be missing."""
        comma = self.use("COMMA")
        tail = ""
        for at in range(len(items) - 1, -1, -1):
            body = (f"{comma} {items[at]}" if at else items[at]) + tail
            tail = f" {body}" if at < n_required else f" ({body})?"
        return f'"["{tail} "]"'

    # Fields

    def _object(self, info: Any, place: str) -> str:
        name = self._begin(info)
        if name is not None:
            return name
        fields: list[tuple[str, str, bool]] = []
        if getattr(info, "tag_field", None) is not None:
            fields.append((info.tag_field, self.terminal(literal(_encoded(info.tag))), True))
        for field in info.fields:
            item = self._item(field.type, f"{place}.{field.encode_name}")
            fields.append((field.encode_name, item, field.required))
        if getattr(info, "array_like", False):
            n_required = max((at + 1 for at, one in enumerate(fields) if one[2]), default=0)
            return self._end(info, self._array([item for _, item, _ in fields], n_required))
        colon, comma = self.use("COLON"), self.use("COMMA")
        # first: what may follow where nothing was written yet; rest: where something was.
        first, rest = "", ""
        for key, item, required in reversed(fields):
            member = f"{literal(_encoded(key))} {colon} {item}"
            after = f" {rest}" if rest else ""
            both = f"{member}{after}"
            if required:
                first, rest = self.rule(both), self.rule(f"{comma} {both}")
            else:
                first = self.rule(f"{both} | {first}" if first else f"({both})?")
                rest = self.rule(f"({comma} {member})?{after}")
        return self._end(info, f'"{{" {first} "}}"')

    def _named_tuple(self, info: inspect.NamedTupleType, place: str) -> str:
        name = self._begin(info)
        if name is not None:
            return name
        items = [self._item(one.type, f"{place}.{one.name}") for one in info.fields]
        required = sum(one.required for one in info.fields)
        return self._end(info, self._array(items, required))

    def _begin(self, info: inspect.Type) -> str | None:
        """The rule of a type that was met before, perhaps inside itself."""
        known = self._named.get(id(info))
        if known is None:
            self._kept.append(info)
            self._named[id(info)] = self.name()
        return known

    def _end(self, info: inspect.Type, body: str) -> str:
        name = self._named[id(info)]
        self._rules[name] = body
        return name


_SIMPLE: dict[type, str] = {
    inspect.NoneType: "NULL",
    inspect.DateType: "DATE",
    inspect.TimeDeltaType: "DURATION",
    inspect.UUIDType: "UUID",
    inspect.DecimalType: "DECIMAL",
}
_HANDLERS: dict[type, Callable[[Grammar, Any, str], str]] = {
    inspect.AnyType: Grammar._any,
    inspect.RawType: Grammar._any,
    inspect.BoolType: Grammar._bool,
    inspect.IntType: Grammar._integer,
    inspect.FloatType: Grammar._float,
    inspect.StrType: Grammar._string,
    inspect.BytesType: Grammar._bytes,
    inspect.ByteArrayType: Grammar._bytes,
    inspect.MemoryViewType: Grammar._bytes,
    inspect.DateTimeType: Grammar._date_time,
    inspect.TimeType: Grammar._time,
    inspect.LiteralType: Grammar._literals,
    inspect.EnumType: Grammar._enum,
    inspect.UnionType: Grammar._union,
    inspect.ListType: Grammar._sequence,
    inspect.SetType: Grammar._set,
    inspect.FrozenSetType: Grammar._set,
    inspect.VarTupleType: Grammar._sequence,
    inspect.CollectionType: Grammar._sequence,
    inspect.TupleType: Grammar._tuple,
    inspect.DictType: Grammar._mapping,
    inspect.StructType: Grammar._object,
    inspect.TypedDictType: Grammar._object,
    inspect.DataclassType: Grammar._object,
    inspect.NamedTupleType: Grammar._named_tuple,
}
_LIMITED = {inspect.IntType: "int", inspect.FloatType: "float"}
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


def _bare(info: inspect.Type) -> inspect.Type:
    return _bare(info.type) if isinstance(info, inspect.Metadata) else info


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


def _check_times(low: int, high: int | None, place: str) -> None:
    if max(low, high or 0) > _MOST:
        raise UnsupportedError(
            f"into: {place} has a length of {max(low, high or 0)}; grammars count to {_MOST}"
        )
    if high is not None and high < low:
        raise UnsupportedError(f"into: no length of {place} is from {low} to {high}")


def _times(low: int, high: int | None) -> str:
    return f"{{{low},{'' if high is None else high}}}"


def _int_limits(info: inspect.IntType) -> tuple[int | None, int | None]:
    lows = [one for one in (info.ge, None if info.gt is None else info.gt + 1) if one is not None]
    highs = [one for one in (info.le, None if info.lt is None else info.lt - 1) if one is not None]
    return (max(lows) if lows else None), (min(highs) if highs else None)

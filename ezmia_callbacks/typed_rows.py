"""Values of files and checkpoints, read as the types that the package declares for them, or refused.

One border for all that comes from outside: a dataclass says what a row holds, and what is anything else ends
in an error of the package that names the place, before anything computes with it. Own code, for pydantic and
its like are not there where torch and transformers are, and know neither the arrays nor the errors of this
package.
"""

import json
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin

import numpy as np

from ezmia_callbacks.errors import ConfigurationError

__all__: list[str] = []

_Value = TypeVar("_Value")

# Whoever writes or copies what was read recurses further than whoever reads it.
_DEEPEST = 64
# No count, figure or seed is beyond these; sums, squares and axes of what is overflow.
_LARGEST_WHOLE = 2**128
_LARGEST = 1e100


def parse_json(text: str | bytes, *, allow_nan: bool = False) -> Any:
    """The value that a text holds as JSON: finite numbers, names that do not repeat, no deep nesting.

    Args:
        text: The text.
        allow_nan: Take NaN and infinities, as Python does; other programs write them.

    Raises:
        ConfigurationError: saying what is wrong with the text.

    >>> parse_json('{"auc": 0.5}')
    {'auc': 0.5}
    """
    try:
        value = json.loads(
            text,
            parse_constant=None if allow_nan else _refuse_constant,
            parse_float=None if allow_nan else _finite,
            object_pairs_hook=_distinct,
        )
    except RecursionError:
        raise ConfigurationError("it is nested too deeply") from None
    except ConfigurationError:
        raise
    # No JSON, no UTF-8, or more digits than Python converts.
    except ValueError as error:
        raise ConfigurationError(f"it is not JSON ({error})") from None
    _check_depth(value)
    return value


def read_value(kind: type[_Value], value: object, *, newer: Collection[str] = (), name: str = "") -> _Value:
    """A value from outside as the type that is declared for it; nothing is converted but lists to arrays.

    Of a dataclass every field has to be there, but for those that are kept in memory alone
    (`compare=False`), and none besides. Types are `bool`, `int`, `float` (also whole numbers), `str`, None,
    `Literal`, unions, tuples, mappings by text, dataclasses, arrays as jaxtyping writes them, and `object`,
    which may be anything.

    Args:
        kind: The type.
        value: What was read: of JSON, or of a checkpoint.
        newer: Names of fields, at any depth, that older files lack: they have their defaults then. A field
            of such a name without a default has to be there.
        name: Name of the value, for the error.

    Raises:
        ConfigurationError: naming the place, what was got and what is needed there.
        CanaryError: from a dataclass that refuses what it was given.

    >>> read_value(tuple[int, ...], [1, 2], name="steps")
    (1, 2)
    >>> read_value(tuple[int, ...], [1, True], name="steps")
    Traceback (most recent call last):
        ...
    ezmia_callbacks.errors.ConfigurationError: `steps[1]` is True; a whole number is needed
    """
    return cast(_Value, _read(kind, value, name, frozenset(newer)))


def read_mapping(value: object, name: str = "") -> Mapping[str, Any]:
    """A value from outside that has to be a mapping by names; what it holds is not looked at.

    Raises:
        ConfigurationError: if it is none.
    """
    if not isinstance(value, Mapping):
        raise _unfit(value, name, "an object with names")
    if other := [key for key in value if not isinstance(key, str)]:
        raise _unfit(other[0], name, "names that are text")
    return value


def read_rest(row: object, *, schema: int) -> dict[str, Any]:
    """What a row holds besides its schema's number.

    Raises:
        ConfigurationError: if it is no row, or of another schema: that is not guessed at.

    >>> read_rest({"schema": 1, "caveat": ""}, schema=1)
    {'caveat': ''}
    """
    rest = dict(read_mapping(row))
    if "schema" not in rest:
        raise ConfigurationError("it has no schema number: it is a file of another kind")
    found = rest.pop("schema", None)
    if isinstance(found, bool) or found != schema:
        raise ConfigurationError(f"its schema is not {schema}, the only one that this release reads")
    return rest


def _read(kind: Any, value: Any, place: str, newer: frozenset[str]) -> Any:
    if kind is object or kind is Any:
        return value
    if isinstance(kind, _Array):
        return kind.read(value, place)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        if not any(type(value) is type(one) and value == one for one in arguments):
            raise _unfit(value, place, f"one of {', '.join(map(repr, arguments))}")
        return value
    if origin in (Union, UnionType):
        return _read_union(arguments, value, place, newer)
    if origin is tuple:
        return _read_tuple(arguments, value, place, newer)
    if origin is Mapping:
        return {
            key: _read(arguments[1], item, _inside(place, key), newer)
            for key, item in read_mapping(value, place).items()
        }
    if is_dataclass(kind):
        return _read_dataclass(cast(type, kind), value, place, newer)
    return _read_plain(kind, value, place)


def _read_plain(kind: Any, value: Any, place: str) -> Any:
    # To Python True is a number.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and is_number and isinstance(value, int):
        if abs(value) >= _LARGEST_WHOLE:
            raise ConfigurationError(f"`{place}` is a whole number of more than 128 bits")
        return value
    if kind is float and is_number:
        if isinstance(value, int):
            _read_plain(int, value, place)
        elif not abs(value) <= _LARGEST:
            raise _unfit(value, place, "a finite number below 1e100")
        return value
    if kind is str and isinstance(value, str):
        return value
    if kind is NoneType and value is None:
        return value
    raise _unfit(value, place, _NEEDED.get(kind, f"a {getattr(kind, '__name__', kind)}"))


_NEEDED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    NoneType: "nothing",
}


def _read_union(kinds: Sequence[Any], value: Any, place: str, newer: frozenset[str]) -> Any:
    if value is None and NoneType in kinds:
        return None
    *others, last = [kind for kind in kinds if kind is not NoneType]
    for kind in others:
        try:
            return _read(kind, value, place, newer)
        except ConfigurationError:
            continue
    return _read(last, value, place, newer)


def _read_tuple(kinds: Sequence[Any], value: Any, place: str, newer: frozenset[str]) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _unfit(value, place, "a list")
    if kinds[-1] is Ellipsis:
        kinds = [kinds[0]] * len(value)
    if len(kinds) != len(value):
        raise _unfit(value, place, f"a list of {len(kinds)}")
    pairs = zip(kinds, value, strict=True)
    return tuple(_read(kind, item, f"{place}[{i}]", newer) for i, (kind, item) in enumerate(pairs))


def _read_dataclass(kind: type, value: Any, place: str, newer: frozenset[str]) -> Any:
    row, kinds = read_mapping(value, place), _field_kinds(kind)
    where = f" in `{place}`" if place else ""
    may_lack = newer & _names_with_default(kind)
    if missing := [name for name in kinds if name not in row and name not in may_lack]:
        raise ConfigurationError(f"it has no `{missing[0]}`{where}")
    if unknown := [name for name in row if name not in kinds]:
        raise ConfigurationError(
            f"it has {_shown_name(unknown[0])}{where}, of which this release does not know"
        )
    values = {name: _read(kinds[name], item, _inside(place, name), newer) for name, item in row.items()}
    lengths: dict[str, int] = {}
    for name, each in kinds.items():
        if isinstance(each, _Array) and name in values:
            for dim, length in zip(each.dims, values[name].shape, strict=True):
                if lengths.setdefault(dim, length) != length:
                    raise ConfigurationError(
                        f"`{_inside(place, name)}` has {length} {dim}, and the arrays beside it have "
                        f"{lengths[dim]}"
                    )
    return kind(**values)


@cache
def _names_with_default(kind: type) -> frozenset[str]:
    has_default = {
        entry.name: entry.default is not MISSING or entry.default_factory is not MISSING
        for entry in fields(kind)
    }
    return frozenset(name for name in has_default if has_default[name])


@cache
def _field_kinds(kind: type) -> dict[str, Any]:
    """Type of each field that files hold."""
    namespace = vars(sys.modules[kind.__module__])
    kinds: dict[str, Any] = {}
    for entry in fields(kind):
        if not entry.compare:
            continue
        # Field by field: types of what is kept in memory alone may be known to type checkers only.
        kinds[entry.name] = _declared(cast(Any, entry.type), namespace)
    return kinds


def _declared(annotation: Any, namespace: dict[str, Any]) -> Any:
    if isinstance(annotation, str):
        # The package's own source, as `typing.get_type_hints` does; jaxtyping is known to type checkers only.
        annotation = eval(annotation, {**namespace, **_JAXTYPING})
    if get_origin(annotation) is np.ndarray:
        (item,) = get_args(get_args(annotation)[1])
        return _Array(np.dtype(item).name, ("n_records",))
    return annotation


@dataclass(frozen=True)
class _Array:
    """An array, in a checkpoint as it is, in JSON as a list.

    Attributes:
        dtype: Name of its type.
        dims: Name of each dimension.
    """

    dtype: str
    dims: tuple[str, ...]

    def read(self, value: Any, place: str) -> np.ndarray:
        needed = f"an array of {self.dtype} with {len(self.dims)} dimensions"
        if isinstance(value, list | tuple) and len(self.dims) == 1:
            item = {"b": bool, "i": int, "f": float}[np.dtype(self.dtype).kind]
            items = [_read_plain(item, each, f"{place}[{i}]") for i, each in enumerate(value)]
            try:
                return np.array(items, dtype=self.dtype)
            except OverflowError:
                raise _unfit(max(items, key=abs), place, "numbers of 64 bits") from None
        if not isinstance(value, np.ndarray):
            raise _unfit(value, place, needed)
        if value.dtype != self.dtype or value.ndim != len(self.dims):
            raise ConfigurationError(
                f"`{place}` is an array of {value.dtype} with {value.ndim} dimensions; {needed} is needed"
            )
        return value


class _Annotation:
    """What jaxtyping has under a name: `Float64[np.ndarray, "n_audits n_records"]`."""

    def __init__(self, name: str) -> None:
        self._dtype = name.lower()

    def __getitem__(self, parameters: tuple[type, str]) -> _Array:
        return _Array(self._dtype, tuple(parameters[1].split()))


_JAXTYPING = {name: _Annotation(name) for name in ("Bool", "Int64", "Float32", "Float64")}


def _inside(place: str, key: str) -> str:
    name = key if _is_plain(key) else f"[{_shown_name(key)}]"
    return name if not place else place + name if name.startswith("[") else f"{place}.{name}"


def _is_plain(name: str) -> bool:
    return name.isidentifier() and name.isascii() and len(name) <= 40


def _shown_name(name: str) -> str:
    """A name that is no field's may be anything."""
    return repr(name) if _is_plain(name) else f"a name of {len(name)} characters"


def _unfit(value: Any, place: str, needed: str) -> ConfigurationError:
    return ConfigurationError(f"{f'`{place}`' if place else 'it'} is {_shown(value)}; {needed} is needed")


def _shown(value: Any) -> str:
    """A value for an error message: short, on one line, without characters that steer a terminal."""
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if value is None or isinstance(value, bool | float):
        return repr(value)
    if isinstance(value, int):
        return repr(value) if abs(value) < 1e20 else "a very large number"
    if isinstance(value, str):
        # It may be a record's.
        return f"a text of {len(value)} character{'' if len(value) == 1 else 's'}"
    return f"a {type(value).__name__}"


def _refuse_constant(name: str) -> None:
    raise ConfigurationError(f"it holds {name} where a finite number is needed")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ConfigurationError(f"it holds {text[:40]}, which is no finite number here")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigurationError(f"it names {_shown_name(twice)} more than once")
    return row


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            item
            for outer in level
            if isinstance(outer, dict | list)
            for item in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(item, dict | list)
        ]
        if not level:
            return
    raise ConfigurationError(f"it is nested more than {_DEEPEST} levels deep")

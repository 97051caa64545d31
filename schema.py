"""What a file must hold: schemas of loaded values, as functions that name what does not fit.

A schema is called with a value and its name, and yields one text per problem. `check` raises the first ones as an
InputError.

    ROW = mapping({"epoch": integer(1)}, rest=number())
    check(rows, list_of(ROW), "log.json", "repeat the test")     # log.json: 3.epoch is 'two', not an integer >= 1; ...
"""

import itertools
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from program import InputError

Schema = Callable[[Any, str], Iterator[str]]
MAX_PROBLEMS = 4  # in one message


def check(value: Any, schema: Schema, origin: Any, advice: str, argument: str | None = None) -> None:
    """Raise InputError "<origin>: <problems>; <advice>" unless a value fits a schema."""
    problems = list(schema(value, ""))
    if problems:
        more = len(problems) - MAX_PROBLEMS
        text = ", ".join(problems[:MAX_PROBLEMS]) + (f" and {more} more" if more > 0 else "")
        raise InputError(f"{origin}: {text}; {advice}", argument)


def _mismatch(value, name, wanted):
    return f"{name or 'it'} is {reprlib.repr(value)}, not {wanted}"


def anything(value: Any, name: str) -> Iterator[str]:
    yield from ()


def text(value: Any, name: str) -> Iterator[str]:
    if not isinstance(value, str):
        yield _mismatch(value, name, "text")


def integer(at_least: int) -> Schema:
    """An integer of 64 bits."""

    def problems(value, name):
        if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value < 2**63:
            yield _mismatch(value, name, f"an integer >= {at_least}")

    return problems


def number(at_least: float | None = None) -> Schema:
    """A number; without a bound, nan and infinity too."""

    def problems(value, name):
        is_number = isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
        if isinstance(value, bool) or not is_number:
            yield _mismatch(value, name, "a number")
        elif at_least is not None and not at_least <= value < float("inf"):
            yield _mismatch(value, name, f"a finite number >= {at_least}")

    return problems


def optional(schema: Schema) -> Schema:
    """None, or a value that fits the schema."""

    def problems(value, name):
        if value is not None:
            yield from schema(value, name)

    return problems


def exactly(expected: int | str) -> Schema:
    def problems(value, name):
        if type(value) is not type(expected) or value != expected:
            yield _mismatch(value, name, reprlib.repr(expected))

    return problems


def any_of(*schemas: Schema) -> Schema:
    """A value that fits one of the schemas; the problems are those of the first."""

    def problems(value, name):
        found = [list(schema(value, name)) for schema in schemas]
        yield from found[0] if all(found) else ()

    return problems


def list_of(schema: Schema, at_least: int = 0) -> Schema:
    """A list or tuple of values that fit the schema, with at least so many entries."""

    def problems(value, name):
        if not isinstance(value, list | tuple):
            yield _mismatch(value, name, "a list")
        elif len(value) < at_least:
            yield f"{name or 'it'} has {len(value)} entries, not at least {at_least}"
        else:
            for index, item in enumerate(value):
                yield from schema(item, _join(name, index))

    return problems


def sequence(*schemas: Schema) -> Schema:
    """A list or tuple with one value per schema."""

    def problems(value, name):
        if not isinstance(value, list | tuple) or len(value) != len(schemas):
            yield _mismatch(value, name, f"a list of {len(schemas)} entries")
        else:
            for index, schema in enumerate(schemas):
                yield from schema(value[index], _join(name, index))

    return problems


def mapping(
    required: Mapping[Any, Schema] | None = None,
    optional: Mapping[Any, Schema] | None = None,
    rest: Schema | None = None,
) -> Schema:
    """A dict with the keys of `required`, perhaps those of `optional`, and others that are text if they fit `rest`."""
    required, optional = required or {}, optional or {}

    def problems(value, name):
        if not isinstance(value, Mapping):
            yield _mismatch(value, name, "a mapping")
            return
        for key, schema in itertools.chain(required.items(), optional.items()):
            if key in value:
                yield from schema(value[key], _join(name, key))
            elif key in required:
                yield f"{_join(name, key)} is missing"
        for key in value:
            if key in required or key in optional:
                continue
            if rest is None or not isinstance(key, str):
                yield f"{_join(name, key)} is unknown"
            else:
                yield from rest(value[key], _join(name, key))

    return problems


def _join(name, key):
    key = key if isinstance(key, str) else reprlib.repr(key)
    return f"{name}.{key}" if name else key


# ---- tensors ---------------------------------------------------------------------------------------------------------


REAL = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
REAL |= {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


def tensor(shape: Sequence[int] | None = None, finite: bool = False) -> Schema:
    """A tensor of real numbers, of this shape; `finite`: without numbers that float32 cannot hold."""

    def problems(value, name):
        if not isinstance(value, torch.Tensor) or value.dtype not in REAL:
            kind = str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__
            yield f"{name} is {kind}, not a tensor of real numbers"
        elif shape is not None and tuple(value.shape) != tuple(shape):
            yield f"{name} is {tuple(value.shape)}, not {tuple(shape)}"
        elif finite and not value.float().isfinite().all():
            yield f"{name} contains NaN or infinity"

    return problems


def tensors_like(
    state_dict: Mapping[str, torch.Tensor], may_lack: Sequence[str] = (), finite: bool = False, **others: Schema
) -> Schema:
    """Tensors with the names and shapes of a state dict, and `others`; the names in `may_lack` may be missing."""
    schemas = {key: tensor(value.shape, finite) for key, value in state_dict.items()}
    return mapping(
        others | {key: schema for key, schema in schemas.items() if key not in may_lack},
        {key: schema for key, schema in schemas.items() if key in may_lack},
    )


OPTIMIZER_STATE = {  # what the optimizers here keep per parameter: its own shape, or a number
    "Adam": ("exp_avg", "exp_avg_sq", "step"),
    "SGD": ("momentum_buffer",),
    "RMSprop": ("square_avg", "step"),
}


def optimizer_like(optimizer: torch.optim.Optimizer) -> Schema:
    """The state dict of an optimizer of the same kind and the same parameters, whatever its settings."""
    groups, states = [], {}
    for group in optimizer.param_groups:
        ids = range(len(states), len(states) + len(group["params"]))
        groups.append(mapping({"params": sequence(*map(exactly, ids))}, rest=anything))
        states |= {index: _state_like(optimizer, value) for index, value in zip(ids, group["params"], strict=True)}
    return mapping({"state": mapping(optional=states), "param_groups": sequence(*groups)})


def _state_like(optimizer, parameter):
    """The state of a parameter; it is empty before the first step."""
    names = OPTIMIZER_STATE[type(optimizer).__name__]
    full = mapping({name: tensor(() if name == "step" else parameter.shape) for name in names})

    def problems(value, name):
        if not isinstance(value, dict) or value:
            yield from full(value, name)

    return problems

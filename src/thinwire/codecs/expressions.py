"""Expressions such as "feedback(topk(1/64) | int4)", read with Python's own grammar and nothing of Python's power.

Allowed are names from a table, calls of them, |, numbers with + - * /, and strings, True and False as options.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

from thinwire.errors import ConfigError

#: What a name stands for: called with no arguments it is the codec with its defaults.
Table = Mapping[str, Callable[..., Any]]

_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def evaluate(expression: str, table: Table) -> object:
    """The value of an expression: what the entries of `table` return, joined with |.

    raises  ConfigError for anything but an expression of the kind above
    """
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        return _value(tree.body, table)
    except (SyntaxError, ValueError, RecursionError, MemoryError, ArithmeticError) as error:
        raise _refusal(f"{expression!r} cannot be read ({getattr(error, 'msg', error)})") from error


def options(entry: Callable[..., Any]) -> dict[str, object]:
    """The options an entry takes and their defaults; `inspect.Parameter.empty` where one must be given.

    An entry that is itself a codec, such as int8, is called to change what it already has.
    """
    parameters = inspect.signature(entry).parameters
    return {name: getattr(entry, name, p.default) if p.default is None else p.default for name, p in parameters.items()}


def _value(node: ast.expr, table: Table) -> Any:
    match node:
        case ast.BinOp(left, ast.BitOr(), right):
            return _joined(_value(left, table), _value(right, table), node)
        case ast.BinOp(left, op, right) if type(op) in _ARITHMETIC:
            return _ARITHMETIC[type(op)](_number(left, table), _number(right, table))
        case ast.UnaryOp(ast.USub(), operand):
            return -_number(operand, table)
        case ast.Constant(int() | float() | str() as constant):
            return constant
        case ast.Name(name):
            return _called(name, [], {}, table)
        case ast.Call(ast.Name(name), arguments, keywords):
            positional = [_value(argument, table) for argument in arguments]
            return _called(name, positional, _named(name, keywords, table), table)
    raise _refusal(f"{ast.unparse(node)!r} has no meaning here")


def _named(name: str, keywords: list[ast.keyword], table: Table) -> dict[str, Any]:
    unpacked = [keyword for keyword in keywords if keyword.arg is None]
    if unpacked:
        raise _refusal(f"{name}(**{ast.unparse(unpacked[0].value)}) has no meaning here")
    return {str(keyword.arg): _value(keyword.value, table) for keyword in keywords}


def _number(node: ast.expr, table: Table) -> Any:
    value = _value(node, table)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _refusal(f"{ast.unparse(node)!r} is no number")
    return value


def _joined(left: Any, right: Any, node: ast.expr) -> Any:
    for side in (left, right):
        if isinstance(side, int | float | str):
            raise _refusal(f"{ast.unparse(node)!r}: {side!r} is no codec")
    return left | right


def _called(name: str, positional: list[Any], named: dict[str, Any], table: Table) -> Any:
    """The entry's value, after its options were checked against its signature: their names; their values check it."""
    if name not in table:
        close = difflib.get_close_matches(name, table, n=1)
        raise ConfigError(
            f"no codec is called {name!r}",
            expected="one of " + ", ".join(sorted(table)),
            mend=f"did you mean {close[0]}?" if close else "`thinwire codecs` shows what each of them does",
        )
    _check_options(name, table[name], len(positional), list(named))
    return table[name](*positional, **named)


def _check_options(name: str, entry: Callable[..., Any], num_positional: int, named: list[str]) -> None:
    """The options' names and number; what their values may be, the codec knows."""
    accepted = options(entry)
    parameters = inspect.signature(entry).parameters.values()
    by_place = [p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    given = by_place[:num_positional] + named
    if num_positional > len(by_place):
        wrong = f"{name} takes {len(by_place)} options without their names, not {num_positional}"
    elif unknown := [option for option in named if option not in accepted]:
        wrong = f"{name} does not take {unknown[0]!r}"
    elif twice := [option for option in given if given.count(option) > 1]:
        wrong = f"{name} is given {twice[0]!r} twice"
    elif missing := [o for o, value in accepted.items() if value is inspect.Parameter.empty and o not in given]:
        wrong = f"{name} needs {missing[0]!r}"
    else:
        return
    raise ConfigError(
        wrong,
        expected=f"{name} takes {', '.join(accepted) or 'no options'}",
        mend=f"`thinwire codecs {name}` shows what it takes and its defaults",
    )


def _refusal(wrong: str) -> ConfigError:
    return ConfigError(
        wrong,
        expected="codecs joined with |, such as topk(1/64) | int4 | zstd or feedback(int4(block=128))",
        mend="`thinwire codecs` lists the codecs and their options",
    )

"""Expressions such as "feedback(topk(1/64) | int4)", read with Python's own grammar and nothing of Python's power.

Allowed are names from a table, calls of them, |, numbers with + - * /, and strings, True, False and (1, 2) as options.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from thinwire.errors import ConfigError


@dataclass(frozen=True)
class Words:
    """What the names of a kind of expression stand for.

    kind     "codec", "topology": what errors call a value
    entries  name -> what makes the value; called with no arguments it has its defaults
    example  an expression or two
    help     where a person finds the names; `{}` stands for one of them
    """

    kind: str
    entries: Mapping[str, Callable[..., Any]]
    example: str
    help: str

    def help_on(self, name: str = "") -> str:
        """Where a person finds all names, or one."""
        return self.help.format(name).replace(" `", "`")


_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_FITTED = ("shapes", "ranks")  # given by a model or a budget, not by a person


def evaluate(expression: str, words: Words) -> object:
    """The value of an expression: what the entries of `words` return, joined with |.

    raises  ConfigError for anything but an expression of the kind above
    """
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        return _value(tree.body, words)
    except (SyntaxError, ValueError, RecursionError, MemoryError, ArithmeticError) as error:
        raise _refusal(f"{expression!r} cannot be read ({getattr(error, 'msg', error)})", words) from error


def options(entry: Callable[..., Any]) -> dict[str, object]:
    """The options an entry takes and their defaults; `inspect.Parameter.empty` where one must be given.

    An entry that is itself a codec, such as int8, is called to change what it already has. What an entry takes any
    number of, such as the codecs of `layers`, is no option; nor is what a codec is fitted to.
    """
    signature = inspect.signature(entry)
    told = {name: p for name, p in signature.parameters.items() if name not in _FITTED}
    parameters = {name: p for name, p in told.items() if p.kind is not p.VAR_POSITIONAL}
    return {name: getattr(entry, name, p.default) if p.default is None else p.default for name, p in parameters.items()}


def _value(node: ast.expr, words: Words) -> Any:
    match node:
        case ast.BinOp(left, ast.BitOr(), right):
            return _joined(_value(left, words), _value(right, words), node, words)
        case ast.BinOp(left, op, right) if type(op) in _ARITHMETIC:
            return _ARITHMETIC[type(op)](_number(left, words), _number(right, words))
        case ast.UnaryOp(ast.USub(), operand):
            return -_number(operand, words)
        case ast.Constant(int() | float() | str() as constant):
            return constant
        case ast.Tuple(elements):
            return tuple(_value(element, words) for element in elements)
        case ast.Name(name):
            return _called(name, [], {}, words)
        case ast.Call(ast.Name(name), arguments, keywords):
            positional = [_value(argument, words) for argument in arguments]
            return _called(name, positional, _named(name, keywords, words), words)
    raise _refusal(f"{ast.unparse(node)!r} has no meaning here", words)


def _named(name: str, keywords: list[ast.keyword], words: Words) -> dict[str, Any]:
    unpacked = [keyword for keyword in keywords if keyword.arg is None]
    if unpacked:
        raise _refusal(f"{name}(**{ast.unparse(unpacked[0].value)}) has no meaning here", words)
    return {str(keyword.arg): _value(keyword.value, words) for keyword in keywords}


def _number(node: ast.expr, words: Words) -> Any:
    value = _value(node, words)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _refusal(f"{ast.unparse(node)!r} is no number", words)
    return value


def _joined(left: Any, right: Any, node: ast.expr, words: Words) -> Any:
    for side in (left, right):
        if isinstance(side, int | float | str | tuple):
            raise _refusal(f"{ast.unparse(node)!r}: {side!r} is no {words.kind}", words)
    try:
        return left | right
    except TypeError:
        raise _refusal(f"{ast.unparse(node)!r}: a {words.kind} cannot be joined with |", words) from None


def _called(name: str, positional: list[Any], named: dict[str, Any], words: Words) -> Any:
    """The entry's value, after its options were checked against its signature: their names; their values check it."""
    if name not in words.entries:
        close = difflib.get_close_matches(name, words.entries, n=1)
        raise ConfigError(
            f"no {words.kind} is called {name!r}",
            expected="one of " + ", ".join(sorted(words.entries)),
            mend=f"did you mean {close[0]}?" if close else f"{words.help_on()} shows what each of them does",
        )
    _check_options(name, words, len(positional), list(named))
    return words.entries[name](*positional, **named)


def _check_options(name: str, words: Words, num_positional: int, named: list[str]) -> None:
    """The options' names and number; what their values may be, their taker knows."""
    entry = words.entries[name]
    accepted = options(entry)
    parameters = inspect.signature(entry).parameters.values()
    by_place = [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    any_number = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
    given = by_place[:num_positional] + named
    if num_positional > len(by_place) and not any_number:
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
        mend=f"{words.help_on(name)} shows what it takes and its defaults",
    )


def _refusal(wrong: str, words: Words) -> ConfigError:
    return ConfigError(
        wrong,
        expected=f"a {words.kind}, such as {words.example}",
        mend=f"{words.help_on()} lists them and their options",
    )

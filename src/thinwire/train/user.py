"""A task from the user's own code, named "module:function" in a configuration."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from thinwire.errors import ConfigError
from thinwire.options import Options, of_function
from thinwire.train.tasks import Task

_METHODS = ("model", "batch", "loss", "evaluate")


@dataclass(frozen=True)
class UserOptions:
    """A function that returns a task, and what to call it with.

    function  "module:function"; the module is looked for in the current directory too
    options   keyword arguments; a parameter `seed` gets the run's seed
    """

    function: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self, *, seed: int) -> Task:
        """Call the function.

        raises  ConfigError if what it returns is no task
        """
        function = load(self.function)
        given = dict(self.options)
        if "seed" in inspect.signature(function).parameters:
            given["seed"] = seed
        made = function(**given)
        lacking = [name for name in _METHODS if not callable(getattr(made, name, None))]
        if lacking:
            raise ConfigError(
                f"{self.function} returned {type(made).__name__}, which has no {', '.join(lacking)}",
                expected=f"a task, with the methods {', '.join(_METHODS)}",
                mend="see thinwire.train.tasks.Task for what each of them does",
            )
        return cast(Task, made)


def load(name: str) -> Callable[..., object]:
    """The function that "module:function" names.

    raises  ConfigError if the module cannot be imported or has no such function
    """
    module_name, _, function_name = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python script.py` would: the user's module lies beside the configuration
    try:
        function = getattr(importlib.import_module(module_name), function_name, None)
    except Exception as error:  # a user's module may fail in any way
        raise ConfigError(
            f"{name}: importing {module_name!r} failed: {type(error).__name__}: {error}",
            expected="a module that can be imported from the current directory or from where Python looks",
            mend="start from the directory where it lies, and try `python -c 'import ...'` for the whole traceback",
        ) from error
    if not callable(function):
        raise ConfigError(
            f"{name}: {module_name!r} has no function {function_name!r}",
            expected="module:function, the function returning a task",
            mend="check the name after the colon",
        )
    return cast(Callable[..., object], function)


def options_of(name: str) -> Options:
    """What the function can be told: its named parameters, but for the seed, which is the run's."""
    return of_function(load(name), skip=("seed",))

import sys

import pytest

from thinwire.errors import ConfigError
from thinwire.train.user import UserOptions, load, options_of

MODULE = """
from thinwire.train.text import TextOptions

def make(context: int = 8, *, seed, batch_size: int = 2):
    return TextOptions(size="0.2M", context=context, batch_size=batch_size).build(seed=seed)

def unseeded():
    return make(seed=5)

def broken():
    return "no task"

answer = 42
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module in the current directory, under a name of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"user_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    yield name
    sys.modules.pop(name, None)


def test_a_function_of_the_users_own(module):
    task = UserOptions(f"{module}:make", {"context": 4, "batch_size": 3}).build(seed=7)
    assert task.batch(0, 0, 1).inputs.shape == (3, 4)
    assert task.seed == 7
    assert UserOptions(f"{module}:unseeded").build(seed=7).seed == 5


def test_its_options_are_its_parameters_but_for_the_seed(module):
    options = options_of(f"{module}:make")
    assert {name: (option.kind, option.default) for name, option in options.items()} == {
        "context": (int, 8),
        "batch_size": (int, 2),
    }


@pytest.mark.parametrize(
    ("function", "wrong"),
    [
        ("{}:absent", "{0}:absent: '{0}' has no function 'absent'"),
        ("{}:answer", "{0}:answer: '{0}' has no function 'answer'"),
        ("{}x:make", "{0}x:make: importing '{0}x' failed: ModuleNotFoundError: No module named '{0}x'"),
        (":make", ":make: importing '' failed: ValueError: Empty module name"),
    ],
)
def test_what_cannot_be_found(module, function, wrong):
    with pytest.raises(ConfigError) as caught:
        load(function.format(module))
    assert caught.value.wrong == wrong.format(module)


def test_a_module_that_fails(tmp_path, module):
    (tmp_path / f"{module}_bad.py").write_text("1 / 0")
    with pytest.raises(ConfigError, match="failed: ZeroDivisionError: division by zero"):
        load(f"{module}_bad:make")


def test_what_is_returned_must_be_a_task(module):
    with pytest.raises(ConfigError) as caught:
        UserOptions(f"{module}:broken").build(seed=0)
    assert str(caught.value) == (
        f"{module}:broken returned str, which has no model, batch, loss, evaluate\n"
        "  expected  a task, with the methods model, batch, loss, evaluate\n"
        "  mend      see thinwire.train.tasks.Task for what each of them does"
    )

"""One training run as a value: read from a TOML file, changed by command-line flags, written back.

    steps = 400

    [task]
    name = "text"

    [method]
    name = "diloco"
    every = 50
    codec = "topk(1/64) | int4"

Each of the four sections names what it configures and gives its options; which options there are is read off the
dataclass or the function that takes them. A flag is a dotted name (`--method.every 50`) or, where only one section has
it, the last part alone (`--every 50`). docs/configuration.md is written by config_docs.py.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tomli_w

from thinwire.aggregators import AGGREGATORS
from thinwire.codecs import CODECS
from thinwire.errors import ConfigError
from thinwire.expressions import Words, evaluate
from thinwire.flags import Flag, setting, split_flags
from thinwire.options import Option, Options, about, built, check, labelled, of_dataclass, of_function, plain, read
from thinwire.options import unknown as unknown_name
from thinwire.outer import OUTERS
from thinwire.pace import PACERS
from thinwire.topologies import TOPOLOGIES
from thinwire.train import TASKS, TaskOptions, user
from thinwire.train import optimizer as optimizers
from thinwire.train.optimizer import OptimizerOptions
from thinwire.train.text import TextOptions
from thinwire.train.user import UserOptions
from thinwire.units import Duration, Rate

if TYPE_CHECKING:
    from thinwire.method import Method, Phases
    from thinwire.seeds.recipe import Recipe

#: Named methods: name -> a function whose parameters are the method's options. `None` below: thinwire.methods.METHODS.
Methods = Mapping[str, Callable[..., Any]]

Values = dict[str, Any]


@dataclass(frozen=True)
class MethodOptions:
    """How the members stay one model.

    options  keyword arguments of the method's function, and the answers of `_ANSWERS`; codecs, topologies and rules
             as the words that stand for them
    """

    name: str = "diloco"
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self, methods: Methods | None = None) -> Method | Phases | Recipe:
        """Call the method's function."""
        from thinwire.seeds.recipe import Recipe  # here for the reason given in named_methods

        known = _methods(methods)
        options = _method_options(self.name, known)
        for name in self.options:
            if name not in options:
                raise unknown_name(f"method {self.name} has no option {name!r}", name, options, what="one of")
        given = {name: built(options[name], value) for name, value in self.options.items() if name not in _ANSWERS}
        answers = {name: _answer(name, self.options[name]) for name in _ANSWERS if self.options.get(name) is not None}
        own = {name: answers.pop(name) for name in of_function(known[self.name]) if name in answers}
        made: Method | Phases | Recipe = known[self.name](**given, **own)
        if isinstance(made, Recipe):
            _refuse_answers(self.name, answers)
            return made
        pacer = answers.pop("pace", None)
        made = made.but(**answers) if answers else made
        return made if pacer is None else made.paced(pacer)


@dataclass(frozen=True)
class SimulatedLink:
    """All members in one process, real learning on a simulated network and clock."""

    rate: Rate | Literal["unlimited"] = field(
        default=Rate(20e6), metadata=about("up and down of every member's line, or `unlimited`")
    )
    delay: Duration = field(default=Duration(0.04), metadata=about("from one member to another, one way"))
    step_time: Duration = field(default=Duration(0.05), metadata=about("what a local step costs on the clock"))

    def __post_init__(self) -> None:
        if self.rate == Rate(0):
            raise ConfigError(
                "SimulatedLink: rate = 0bit", expected="a rate above 0", mend="set rate to 20mbit, or to 'unlimited'"
            )


@dataclass(frozen=True)
class TorchLink:
    """One process for each member, over torch.distributed.

    Without `address`, `rank` and `world` the group is the workers of this machine, or what torchrun describes.
    """

    backend: Literal["auto", "gloo", "nccl"] = field(
        default="auto", metadata=about('`auto` is `nccl` with `device = "cuda"`, else `gloo`')
    )
    timeout: Duration | Literal["auto"] = field(
        default="auto", metadata=about("limit of every wait; `auto` follows from sizes and the measured link")
    )
    address: str | None = field(default=None, metadata=about("`HOST:PORT` of member 0, the same on all machines"))
    rank: int | None = field(default=None, metadata=about("of this machine's first member", at_least=0))
    world: int | None = field(default=None, metadata=about("number of members on all machines", at_least=1))

    def __post_init__(self) -> None:
        check(self)
        _check_address(self.address)
        if self.timeout == Duration(0):
            raise ConfigError(
                "TorchLink: timeout = 0s", expected="a time above 0", mend="set timeout to 60s, or to 'auto'"
            )
        together = (self.address, self.rank, self.world)
        if any(each is None for each in together) != all(each is None for each in together):
            raise ConfigError(
                f"TorchLink: address = {self.address}, rank = {self.rank}, world = {self.world}",
                expected="all three, or none of them",
                mend="give all three on every machine; leave all three out on a single machine or under torchrun",
            )
        if self.rank is not None and self.world is not None and self.rank >= self.world:
            raise ConfigError(
                f"TorchLink: rank = {self.rank} of world = {self.world}",
                expected="a rank from 0 to world - 1",
                mend="count members from 0",
            )


#: Answers that any method can be given otherwise than it says.
_ANSWERS: Mapping[str, Words] = {
    "topology": Words("topology", {**TOPOLOGIES, **CODECS}, "islands(4)", "docs/architecture.md"),
    "outer": Words("outer step", OUTERS, "nesterov(0.7, 0.9)", "docs/architecture.md"),
    "aggregator": Words("rule", AGGREGATORS, "trimmed_mean(0.2)", "docs/architecture.md"),
    "pace": Words("pacer", PACERS, "by_link(0.2)", "docs/pace.md"),
}

LINKS: Mapping[str, type[SimulatedLink] | type[TorchLink]] = {"simulated": SimulatedLink, "torch": TorchLink}


@dataclass(frozen=True)
class Run:
    """Everything `thinwire train` needs to know."""

    steps: int = field(default=400, metadata=about("local steps of each member", at_least=1))
    max_time: Duration | Literal["unlimited"] = field(
        default="unlimited", metadata=about("on the link's clock; the members stop together soon after it has passed")
    )
    seed: int = field(default=0, metadata=about("of weights, data and rounding", at_least=0))
    eval_every: int = field(
        default=50, metadata=about("local steps between evaluations; 0 evaluates only at the end", at_least=0)
    )
    checkpoint_every: int = field(
        default=100, metadata=about("local steps between checkpoints; 0 writes one only at the end", at_least=0)
    )
    out: str = field(
        default="runs/run",
        metadata=about("folder of what the run writes; in a file NAME.toml it is `runs/NAME` if left out"),
    )
    workers: int = field(default=2, metadata=about("members on this machine", at_least=1))
    device: Literal["auto", "cpu", "cuda"] = field(
        default="auto", metadata=about("where members compute; `auto` is `cuda` where there is a GPU")
    )
    precision: Literal["fp32", "bf16"] = field(
        default="fp32", metadata=about("of the forward and backward pass; weights are float32 either way")
    )
    threads: int = field(default=1, metadata=about("processor threads of each worker", at_least=1))
    task: TaskOptions = field(default_factory=TextOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    method: MethodOptions = field(default_factory=MethodOptions)
    link: SimulatedLink | TorchLink = field(default_factory=TorchLink)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class _Section:
    """What a section of the file is made of.

    chooser  the key that names what is configured
    options  what that can be told
    make     the section's value from a choice and its values
    parts    and back
    common   options that every choice has, and that stay when another one is chosen
    """

    chooser: str
    options: Callable[[str, Methods], Options]
    make: Callable[[str, Values], Any]
    parts: Callable[[Any], tuple[str, Values]]
    common: frozenset[str] = frozenset()


def load(path: str | Path, *, methods: Methods | None = None) -> Run:
    """The run a TOML file describes.

    raises  ConfigError naming the file and the key
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: {getattr(error, 'strerror', None) or error}",
            expected="a TOML file that describes a run",
            mend="check the path; docs/configuration.md shows what to write into it",
        ) from error
    return loads(text, source=str(path), methods=methods)


def loads(text: str, *, source: str = "run.toml", methods: Methods | None = None) -> Run:
    """The run a TOML text describes; `source` is what errors call it, and its stem names the output folder."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: {error}", expected="TOML", mend='text needs quotes: name = "text"') from error
    known, root = _methods(methods), of_dataclass(Run)
    for key in tables:
        if key not in root and key not in _SECTIONS:
            raise unknown_name(f"{source}: there is no {key!r}", key, [*root, *_SECTIONS], what="a key or a section")
    top = _read_table({key: tables[key] for key in tables if key in root}, root, f"{source}: ")
    sections = {name: _read_section(name, tables[name], source, known) for name in _SECTIONS if name in tables}
    return Run(**{"out": f"runs/{Path(source).stem}"} | top | sections)


def dump(run: Run) -> str:
    """The run as TOML, defaults written out; `loads(dump(run)) == run`."""
    top = _written({name: getattr(run, name) for name in of_dataclass(Run)}, of_dataclass(Run))
    tables = {}
    for name, section in _SECTIONS.items():
        choice, values = section.parts(getattr(run, name))
        tables[name] = {section.chooser: choice} | _written(values, of_dataclass(type(getattr(run, name))))
    return tomli_w.dumps(top | tables)


def override(run: Run, flags: Sequence[str], *, methods: Methods | None = None) -> Run:
    """The run with command-line flags applied: `["--steps", "200", "--method.every=50", "--no-tied"]`.

    A flag that names another task, optimizer, method or link (`--method ddp`) starts its options anew: those of the
    old one are dropped, but what every optimizer has (`lr`, `warmup_steps`, ...) stays.

    raises  ConfigError naming the flag as typed
    """
    known = _methods(methods)
    choices = {name: section.parts(getattr(run, name)) for name, section in _SECTIONS.items()}
    settings: list[Flag] = []
    typed: dict[str, list[str]] = {name: [] for name in choices}
    for flag in split_flags(flags):
        section = _chosen_section(flag)
        if section is None:
            settings.append(flag)
        else:
            choices[section] = _choose(section, flag, choices[section], known)
            typed[section].append(flag.typed)
    options = {name: _SECTIONS[name].options(choice, known) for name, (choice, _) in choices.items()}
    options[""] = of_dataclass(Run)
    top: Values = {}
    for flag in settings:
        place, option, value = setting(flag, options, _SECTIONS)
        (choices[place][1] if place else top)[option] = value
        if place:
            typed[place].append(flag.typed)
    for name in [name for name in _SECTIONS if typed[name]]:
        with labelled(" ".join(typed[name])):
            top[name] = _made(name, *choices[name], options[name], where=f"the flag --{name}.{{}}")
    return dataclasses.replace(run, **top)


# ---- sections


def _task_options(name: str, _: Methods) -> Options:
    if ":" in name:
        return user.options_of(name)
    if name not in TASKS:
        raise unknown_name(f"there is no task {name!r}", name, TASKS, what="module:function, or one of")
    return of_dataclass(TASKS[name])


def _make_task(name: str, values: Values) -> TaskOptions:
    return UserOptions(name, values) if ":" in name else TASKS[name](**values)


def _task_parts(task: TaskOptions) -> tuple[str, Values]:
    if isinstance(task, UserOptions):
        return task.function, dict(task.options)
    return next(name for name, kind in TASKS.items() if type(task) is kind), _fields(task)


def _optimizer_options(name: str, _: Methods) -> Options:
    return {**of_dataclass(OptimizerOptions), **optimizers.options_of(name)}


def _make_optimizer(name: str, values: Values) -> OptimizerOptions:
    common = of_dataclass(OptimizerOptions)
    own = {key: value for key, value in values.items() if key not in common}
    return OptimizerOptions(name, **{key: values[key] for key in values if key in common}, options=own)


def _optimizer_parts(optimizer: OptimizerOptions) -> tuple[str, Values]:
    return optimizer.name, _fields(optimizer) | dict(optimizer.options)


def _method_options(name: str, methods: Methods) -> Options:
    if name not in methods:
        raise unknown_name(f"there is no method {name!r}", name, methods, what="one of")
    answers = {
        answer: Option(answer, str | None, None, f"{words.kind} instead of the method's own: `{words.example}`")
        for answer, words in _ANSWERS.items()
    }
    return answers | of_function(methods[name], skip={*_ANSWERS, "seed"})  # of seeds the run's own counts


def _refuse_answers(method: str, answers: Mapping[str, Any]) -> None:
    """Scalars are told to everybody and merged by a recipe's own rule."""
    for name in answers:
        raise ConfigError(
            f"{name} = {answers[name]!r} for method {method}",
            expected="the method's own options: it sends scalars, which no codec, topology or aggregator is made for",
            mend=f"leave {name} out; `thinwire methods {method}` shows what there is",
        )


def _answer(name: str, text: str) -> Any:
    with labelled(f"{name} {text!r}"):
        return evaluate(text, _ANSWERS[name])


def _method_parts(method: MethodOptions) -> tuple[str, Values]:
    return method.name, dict(method.options)


def _link_options(kind: str, _: Methods) -> Options:
    if kind not in LINKS:
        raise unknown_name(f"there is no link {kind!r}", kind, LINKS, what="one of")
    return of_dataclass(LINKS[kind])


def _make_link(kind: str, values: Values) -> SimulatedLink | TorchLink:
    return LINKS[kind](**values)


def _link_parts(link: SimulatedLink | TorchLink) -> tuple[str, Values]:
    return next(kind for kind, each in LINKS.items() if type(link) is each), _fields(link)


_SECTIONS: Mapping[str, _Section] = {
    "task": _Section("name", _task_options, _make_task, _task_parts),
    "optimizer": _Section(
        "name", _optimizer_options, _make_optimizer, _optimizer_parts, frozenset(of_dataclass(OptimizerOptions))
    ),
    "method": _Section("name", _method_options, MethodOptions, _method_parts),
    "link": _Section("kind", _link_options, _make_link, _link_parts),
}


def _fields(instance: Any) -> Values:
    return {name: getattr(instance, name) for name in of_dataclass(type(instance))}


def _methods(methods: Methods | None) -> Methods:
    if methods is not None:
        return methods
    return named_methods()


def named_methods() -> Methods:
    """Everything that `--method` may name: six answers, or a recipe of seeds and scalars."""
    from thinwire.methods import METHODS  # here, so that reading a file is what loads them, not importing this module
    from thinwire.seeds import RECIPES

    return {**METHODS, **RECIPES}


def _check_address(address: str | None) -> None:
    if address is None:
        return
    host, _, port = address.rpartition(":")
    if not (host and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ConfigError(
            f"TorchLink: address = {address!r}",
            expected="HOST:PORT of member 0, e.g. 203.0.113.7:29500",
            mend="name the machine of member 0 as the others see it, and a port that is open there",
        )


# ---- flags


def _chosen_section(flag: Flag) -> str | None:
    """The section of which the flag names the choice: `--method ddp`, `--method.name ddp`."""
    for name, section in _SECTIONS.items():
        if flag.name in (name, f"{name}.{section.chooser}"):
            return name
    return None


def _choose(name: str, flag: Flag, now: tuple[str, Values], methods: Methods) -> tuple[str, Values]:
    choice, values = now
    section = _SECTIONS[name]
    if flag.text == choice:
        return now
    with labelled(flag.typed):
        if flag.text is None:
            raise ConfigError("no value", expected=f"the {name}'s {section.chooser}", mend=f"write --{name} NAME")
        section.options(flag.text, methods)  # refuses unknown names
    return flag.text, {key: value for key, value in values.items() if key in section.common}


# ---- files


def _read_section(name: str, table: object, source: str, methods: Methods) -> Any:
    section = _SECTIONS[name]
    if not isinstance(table, dict):
        raise ConfigError(
            f"{source}: {name} = {table!r}",
            expected=f"a section with the key {section.chooser}",
            mend=f"write [{name}] on a line of its own, and {section.chooser} = {table!r} under it",
        )
    values = dict(table)
    where = f"{source}: {name}.{section.chooser}"
    default, _ = section.parts(getattr(Run(), name))
    choice = str(read(Option(section.chooser, str, default), values.pop(section.chooser, default), where, typed=False))
    with labelled(where):
        options = section.options(choice, methods)
    values = _read_table(values, options, f"{source}: {name}.")
    with labelled(f"{source}: [{name}]"):
        return _made(name, choice, values, options, where=f"{{}} = ... to [{name}]")


def _read_table(given: Mapping[str, object], options: Options, where: str) -> Values:
    """Values of options; `where` is what errors put before a key."""
    for key in given:
        if key not in options:
            raise unknown_name(f"{where}{key}: there is no such option", key, options, what="one of")
    return {key: read(options[key], value, f"{where}{key}", typed=False) for key, value in given.items()}


def _made(name: str, choice: str, values: Values, options: Options, *, where: str) -> Any:
    """The section's value, if everything that must be given was; `where` says how to give what was not."""
    for option in options.values():
        if option.default is MISSING and option.name not in values:
            raise ConfigError(
                f"{choice} lacks {option.name!r}",
                expected=f"{option.name}: {option.help}" if option.help else f"a value for {option.name}",
                mend=f"add {where.format(option.name)}",
            )
    return _SECTIONS[name].make(choice, values)


def _written(values: Values, options: Options) -> Values:
    """Values for TOML, which has no null: None is left out where it is the default, and else the word "none"."""
    return {
        name: plain(value)
        for name, value in values.items()
        if value is not None or name not in options or options[name].default is not None
    }

import dataclasses
import sys
import tomllib
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire import config_docs
from thinwire.codecs import Codec, ErrorFeedback, fp32, int4, topk
from thinwire.config import MethodOptions, Run, SimulatedLink, TorchLink, dump, load, loads, named_methods, override
from thinwire.errors import ConfigError
from thinwire.options import Option, about, check, of_dataclass, of_function, plain, read
from thinwire.outer import SGD, Adam, ClippedMomentum, Nesterov, Restart, Scheduled, SlowMo, per_group
from thinwire.train.huggingface import HuggingFaceOptions
from thinwire.train.images import ImageOptions
from thinwire.train.optimizer import OptimizerOptions
from thinwire.train.text import TextOptions
from thinwire.train.user import UserOptions
from thinwire.units import Duration, Rate, Size

METHODS = named_methods()


def near(every: int = 100, outer_lr: float = 0.7, codec: Codec | ErrorFeedback = fp32) -> Any:
    return "near", every, outer_lr, codec


def far(hops: int, *, mode: Literal["ring", "star"] = "ring", limit: Size | None = None, every: int = 5) -> Any:
    return "far", hops, mode, limit, every


METHODS_HERE = {"near": near, "far": far, "diloco": near}


def flags(*words, run=None):
    return override(run or Run(), words, methods=METHODS_HERE)


def wrong_of(caught):
    error = caught.value
    assert error.expected
    assert error.mend
    return error.wrong


# ---- files

FILE = """
steps = 30
workers = 4
device = "cpu"

[task]
name = "images"
norm = "group"
width = 8

[optimizer]
name = "SGD"
lr = 0.1
momentum = 0.9
schedule = "cosine"

[method]
name = "near"
every = 50
codec = "topk(1/64) | int4"

[link]
kind = "torch"
timeout = "1min"
"""


def test_a_file_in_full(tmp_path):
    (tmp_path / "digits.toml").write_text(FILE)
    assert load(tmp_path / "digits.toml", methods=METHODS_HERE) == Run(
        steps=30,
        workers=4,
        device="cpu",
        out="runs/digits",
        task=ImageOptions(norm="group", width=8),
        optimizer=OptimizerOptions("SGD", lr=0.1, schedule="cosine", options={"momentum": 0.9}),
        method=MethodOptions("near", {"every": 50, "codec": "topk(1/64) | int4"}),
        link=TorchLink(timeout=Duration(60)),
    )


def test_an_empty_file_is_the_defaults():
    assert loads("", methods=METHODS_HERE) == Run()


def test_the_defaults_are_a_run_that_can_be_built():
    run = loads("")
    assert run.method.build() == METHODS["diloco"]()


def test_a_section_without_a_name_sets_options_of_the_default():
    assert loads("task.context = 9\nlink.timeout = '9s'", methods=METHODS_HERE) == Run(
        task=TextOptions(context=9), link=TorchLink(timeout=Duration(9))
    )


def test_a_method_is_built_from_its_options():
    assert MethodOptions("near", {"every": 3}).build(METHODS_HERE) == ("near", 3, 0.7, fp32)
    built = MethodOptions("near", {"codec": "topk(1/64) | int4"}).build(METHODS_HERE)
    assert built == ("near", 100, 0.7, topk(1 / 64) | int4)
    with pytest.raises(ConfigError, match=r"method near has no option 'evry'\n.*\n  mend      did you mean 'every'\?"):
        MethodOptions("near", {"evry": 3}).build(METHODS_HERE)


@pytest.mark.parametrize("name", METHODS)
def test_every_option_of_every_method_can_be_set_from_its_default(name):
    run = override(Run(), ["--method", name])
    for option in of_function(METHODS[name], skip=["topology", "seed"]).values():  # words not its own, and the run's
        value = plain(option.default)
        told = str(value).lower() if isinstance(value, bool) else value
        run = override(run, [f"--method.{option.name}={told}"])
    assert run.method.build() == METHODS[name]()
    assert loads(dump(run)) == run


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("stpes = 3", "run.toml: there is no 'stpes'"),
        ("[tasks]\nname = 'text'", "run.toml: there is no 'tasks'"),
        ("steps = 'many'", "run.toml: steps: 'many' is not a whole number"),
        ("steps = true", "run.toml: steps: True is not a whole number"),
        ("steps = 1.5", "run.toml: steps: 1.5 is not a whole number"),
        ("steps = 0", "run.toml: steps: 0 is out of range"),
        ("device = 'gpu'", "run.toml: device: 'gpu' is no choice here"),
        ("task = 'text'", "run.toml: task = 'text'"),
        ("[task]\nname = 'tekst'", "run.toml: task.name: there is no task 'tekst'"),
        ("[task]\nname = 3", "run.toml: task.name: 3 is not text"),
        ("[task]\ncontxt = 3", "run.toml: task.contxt: there is no such option"),
        ("[task]\ntied = 'yes'", "run.toml: task.tied: 'yes' is not true or false"),
        ("[task]\nname = 'images'\nwidth = 6", "run.toml: [task]: ImageOptions: width = 6"),
        ("[task]\nname = 'huggingface'", "run.toml: [task]: huggingface lacks 'path'"),
        ("[optimizer]\nname = 'Adammm'", "run.toml: optimizer.name: torch.optim has no optimizer 'Adammm' to use here"),
        ("[optimizer]\nlr = inf", "run.toml: optimizer.lr: inf is not a finite number"),
        ("[optimizer]\nbetas = [0.9]", "run.toml: optimizer.betas: 1 values"),
        ("[optimizer]\nbetas = 0.9", "run.toml: optimizer.betas: 0.9 is not a list"),
        ("[optimizer]\nmomentum = 0.9", "run.toml: optimizer.momentum: there is no such option"),
        ("[method]\nname = 'nera'", "run.toml: method.name: there is no method 'nera'"),
        ("[method]\nname = 'far'", "run.toml: [method]: far lacks 'hops'"),
        ("[method]\nevery = 5\nhops = 2", "run.toml: method.hops: there is no such option"),
        ("[method]\ncodec = 4", "run.toml: method.codec: 4 is not a codec expression"),
        ("[link]\nkind = 'simulated'\nrate = 20", "run.toml: link.rate: 20 is not text with a number and a unit"),
        ("[link]\nkind = 'simulated'\ndelay = 40", "run.toml: link.delay: 40 is not text with a number and a unit"),
        ("[link]\nkind = 'simulated'\ndelay = '40'", "run.toml: link.delay: '40' is no duration: it has no unit"),
        ("[link]\nkind = 'simulated'\nrate = '0mbit'", "run.toml: [link]: SimulatedLink: rate = 0bit"),
        ("[link]\nkind = 'simulated'\nbackend = 'nccl'", "run.toml: link.backend: there is no such option"),
        ("[link]\nkind = 'torch'\nrank = 0", "run.toml: [link]: TorchLink: address = None, rank = 0, world = None"),
        ("[link]\nkind = 'torch'\ntimeout = '0s'", "run.toml: [link]: TorchLink: timeout = 0s"),
        ("[link]\nkind = 'torch'\naddress = 'host'", "run.toml: [link]: TorchLink: address = 'host'"),
    ],
)
def test_what_a_file_may_not_say(text, wrong):
    with pytest.raises(ConfigError) as caught:
        loads(text, methods=METHODS_HERE)
    assert wrong_of(caught) == wrong


def test_errors_of_a_file_in_full():
    with pytest.raises(ConfigError) as caught:
        loads("[method]\nevry = 5", source="my.toml", methods=METHODS_HERE)
    assert str(caught.value) == (
        "my.toml: method.evry: there is no such option\n"
        "  expected  one of: aggregator, codec, every, outer, outer_lr, pace, topology\n"
        "  mend      did you mean 'every'?"
    )
    with pytest.raises(ConfigError) as caught:
        loads("[method]\nname = 'far'", methods=METHODS_HERE)
    assert caught.value.mend == "add hops = ... to [method]"
    with pytest.raises(ConfigError) as caught:
        loads("steps = 0", methods=METHODS_HERE)
    assert caught.value.expected == "a number at least 1"
    assert caught.value.mend == "steps is: local steps of each member; left out, it is 400"


def test_the_file_itself(tmp_path):
    with pytest.raises(ConfigError, match=r"none.toml: No such file or directory\n  expected  a TOML file"):
        load(tmp_path / "none.toml", methods=METHODS_HERE)
    (tmp_path / "bad.toml").write_text("steps = many")
    with pytest.raises(ConfigError, match=r"bad.toml: Invalid value \(at line 1, column 9\)"):
        load(tmp_path / "bad.toml", methods=METHODS_HERE)


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
durations = st.builds(Duration, st.floats(0, 1e9))
positive_durations = st.builds(Duration, st.floats(1e-9, 1e9))
counts = st.integers(1, 10**9)
floats = st.floats(1e-12, 1e12)
tasks = st.one_of(
    st.builds(
        TextOptions,
        data=words,
        tokenizer=words,
        context=counts,
        tied=st.booleans(),
        size=st.sampled_from(["3M", "10M"]),
    ),
    st.builds(
        ImageOptions, data=words, norm=st.sampled_from(["batch", "group"]), width=st.integers(1, 9).map(lambda n: 4 * n)
    ),
    st.builds(HuggingFaceOptions, words, lora_targets=st.lists(words, max_size=3).map(tuple), lora_alpha=floats),
)
optimizers = st.one_of(
    st.builds(OptimizerOptions, lr=floats, warmup_steps=counts, schedule=st.sampled_from(["constant", "cosine"])),
    st.builds(
        OptimizerOptions,
        name=st.just("AdamW"),
        options=st.fixed_dictionaries(
            {}, optional={"betas": st.tuples(floats, floats), "foreach": st.none() | st.booleans(), "eps": floats}
        ),
    ),
)
methods = st.one_of(
    st.builds(
        MethodOptions,
        st.just("near"),
        st.fixed_dictionaries({}, optional={"every": counts, "codec": st.sampled_from(["int4", "topk(1/64) | int8"])}),
    ),
    st.builds(
        MethodOptions,
        st.just("far"),
        st.fixed_dictionaries(
            {"hops": counts},
            optional={
                "mode": st.sampled_from(["ring", "star"]),
                "limit": st.none() | st.builds(Size, st.integers(0, 2**63)),
            },
        ),
    ),
)
links = st.one_of(
    st.builds(SimulatedLink, st.builds(Rate, floats) | st.just("unlimited"), durations, durations),
    st.builds(TorchLink, backend=st.sampled_from(["auto", "gloo"]), timeout=positive_durations | st.just("auto")),
    st.builds(TorchLink, address=st.just("[::1]:29500"), rank=st.integers(0, 3), world=st.integers(4, 9)),
)
runs = st.builds(
    Run,
    steps=counts,
    max_time=durations | st.just("unlimited"),
    seed=st.integers(0, 2**63 - 1),
    out=words,
    device=st.sampled_from(["auto", "cpu", "cuda"]),
    task=tasks,
    optimizer=optimizers,
    method=methods,
    link=links,
)


@given(runs)
@settings(max_examples=60, deadline=None)
def test_a_run_is_read_as_it_was_written(run):
    text = dump(run)
    assert loads(text, source="elsewhere.toml", methods=METHODS_HERE) == run
    assert dump(loads(text, methods=METHODS_HERE)) == text


@given(runs)
@settings(max_examples=30, deadline=None)
def test_no_flags_change_nothing(run):
    assert flags(run=run) == run


def test_a_dump_spells_out_the_defaults():
    tables = tomllib.loads(dump(Run(link=SimulatedLink())))
    assert tables["steps"] == 400
    assert tables["task"] == {"name": "text"} | dataclasses.asdict(TextOptions())
    assert tables["link"] == {"kind": "simulated", "rate": "20mbit", "delay": "40ms", "step_time": "50ms"}
    assert tables["method"] == {"name": "diloco"}


# ---- flags


@pytest.mark.parametrize(
    ("words", "change"),
    [
        (["--steps", "7"], {"steps": 7}),
        (["--steps=7"], {"steps": 7}),
        (["--eval-every", "7"], {"eval_every": 7}),
        (["--max-time", "90s"], {"max_time": Duration(90)}),
        (["--out", "a b"], {"out": "a b"}),
        (["--method.every", "50"], {"method": MethodOptions("diloco", {"every": 50})}),
        (["--every", "50"], {"method": MethodOptions("diloco", {"every": 50})}),
        (["--every", "50", "--every", "60"], {"method": MethodOptions("diloco", {"every": 60})}),
        (["--codec", "topk(1/64) | int4"], {"method": MethodOptions("diloco", {"codec": "topk(1/64) | int4"})}),
        (["--lr=1e-3"], {"optimizer": OptimizerOptions(lr=1e-3)}),
        (["--outer_lr", "1/4"], {"method": MethodOptions("diloco", {"outer_lr": 0.25})}),
        (["--no-tied"], {"task": TextOptions(tied=False)}),
        (["--task.no-tied=x", "--tied"], None),
        (["--tied", "false"], {"task": TextOptions(tied=False)}),
        (["--tied", "--context", "5"], {"task": TextOptions(tied=True, context=5)}),
        (
            ["--optimizer", "Muon", "--adamw_lr", "1e-3", "--adamw_betas", "0.8,0.9", "--adjust_lr_fn", "original"],
            {
                "optimizer": OptimizerOptions(
                    "Muon", options={"adamw_lr": 1e-3, "adamw_betas": (0.8, 0.9), "adjust_lr_fn": "original"}
                )
            },
        ),
        (["--optimizer=LARS", "--trust=0.01"], {"optimizer": OptimizerOptions("LARS", options={"trust": 0.01})}),
        (["--betas", "0.8,0.9"], {"optimizer": OptimizerOptions(options={"betas": (0.8, 0.9)})}),
        (["--foreach", "none"], {"optimizer": OptimizerOptions(options={"foreach": None})}),
        (
            ["--link", "simulated", "--rate", "5mbit", "--delay", "1s"],
            {"link": SimulatedLink(rate=Rate(5e6), delay=Duration(1))},
        ),
        (["--link", "simulated"], {"link": SimulatedLink()}),
        (["--link.kind=simulated", "--delay", "1s"], {"link": SimulatedLink(delay=Duration(1))}),
        (["--backend", "gloo"], {"link": TorchLink(backend="gloo")}),
        (["--width", "8", "--task", "images"], {"task": ImageOptions(width=8)}),
        (["--method", "far", "--hops", "2"], {"method": MethodOptions("far", {"hops": 2})}),
        (
            ["--method.name", "far", "--hops", "2", "--limit", "1kB"],
            {"method": MethodOptions("far", {"hops": 2, "limit": Size(1000)})},
        ),
        (
            ["--optimizer", "SGD", "--momentum", "0.9"],
            {"optimizer": OptimizerOptions("SGD", options={"momentum": 0.9})},
        ),
    ],
)
def test_what_flags_change(words, change):
    if change is None:
        with pytest.raises(ConfigError):
            flags(*words)
    else:
        assert flags(*words) == dataclasses.replace(Run(), **change)


def test_another_choice_starts_its_options_anew():
    run = loads(FILE, methods=METHODS_HERE)
    assert flags("--method", "diloco", run=run).method == MethodOptions("diloco")
    assert flags("--method", "near", run=run).method == run.method  # the same one: nothing changes
    assert flags("--task", "text", run=run).task == TextOptions()
    changed = flags("--optimizer", "AdamW", run=run).optimizer
    assert changed == OptimizerOptions("AdamW", lr=0.1, schedule="cosine")  # momentum was SGD's own


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (["--evry", "50"], "--evry 50: no such option"),
        (["--method.evry=50"], "--method.evry=50: no such option"),
        (["--stepz"], "--stepz: no such option"),
        (["--steps", "x"], "--steps x: 'x' is not a whole number"),
        (["--steps=0"], "--steps=0: 0 is out of range"),
        (["--steps"], "--steps: no value"),
        (["--steps", "--lr", "1"], "--steps: no value"),
        (["--no-steps"], "--no-steps: steps is not true or false"),
        (["--tied", "maybe"], "--tied maybe: 'maybe' is not true or false"),
        (["--lr", "nan"], "--lr nan: 'nan' is not a finite number"),
        (["--lr", "1/0"], "--lr 1/0: '1/0' is not a finite number"),
        (["steps", "3"], "steps: not a flag"),
        (["--", "3"], "--: not a flag"),
        (["-s", "3"], "-s: not a flag"),
        (["--link=simulated", "--rate", "20 mbps"], "--rate '20 mbps': '20 mbps' is no rate"),
        (["--link=simulated", "--delay", "40"], "--delay 40: '40' is no duration: it has no unit"),
        (["--precision", "fp8"], "--precision fp8: 'fp8' is no choice here"),
        (["--method", "nowhere"], "--method nowhere: there is no method 'nowhere'"),
        (["--method"], "--method: no value"),
        (["--rate", "1mbit"], "--rate 1mbit: no such option"),
        (
            ["--rank", "1", "--timeout=9s"],
            "--rank 1 --timeout=9s: TorchLink: address = None, rank = 1, world = None",
        ),
        (["--method", "far"], "--method far: far lacks 'hops'"),
        (["--task", "images", "--width=6"], "--task images --width=6: ImageOptions: width = 6"),
        (["--betas", "0.9"], "--betas 0.9: 1 values"),
        (["--name", "x"], "--name x: no such option"),
    ],
)
def test_flags_that_cannot_be(words, wrong):
    with pytest.raises(ConfigError) as caught:
        flags(*words)
    assert wrong_of(caught) == wrong


def test_a_codec_is_refused_with_the_flag_as_typed():
    with pytest.raises(ConfigError) as caught:
        flags("--codec", "topk(1.5) | int4")
    assert caught.value.wrong.startswith("--codec 'topk(1.5) | int4': topk")


@pytest.mark.parametrize(
    ("word", "mend"),
    [
        ("--evry", "did you mean --method.every?"),
        ("--method.evry", "did you mean --method.every?"),
        ("--LR", "did you mean --optimizer.lr?"),
        ("--methd", "did you mean --method?"),
        ("--check-point-every", "did you mean --checkpoint_every?"),
        ("--zzz", "docs/configuration.md lists the options"),
    ],
)
def test_what_was_probably_meant(word, mend):
    with pytest.raises(ConfigError) as caught:
        flags(word, "1")
    assert caught.value.mend == mend


def test_a_name_that_two_sections_have():
    with pytest.raises(ConfigError) as caught:
        override(Run(), ["--optimizer", "SGD", "--momentum", "0.5"], methods=METHODS)
    assert str(caught.value) == (
        "--momentum 0.5: 2 sections have an option 'momentum'\n"
        "  expected  one of --optimizer.momentum, --method.momentum\n"
        "  mend      write --optimizer.momentum"
    )
    run = override(Run(), ["--optimizer", "SGD", "--method.momentum", "0.5"], methods=METHODS)
    assert run.method.options == {"momentum": 0.5}


# ---- a user's own task


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"task_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text("def make(depth: int, *, seed: int, wide=True): ...")
    yield name
    sys.modules.pop(name, None)


def test_a_users_task_has_the_options_of_its_function(module):
    run = loads(f"[task]\nname = '{module}:make'\ndepth = 3", methods=METHODS_HERE)
    assert run.task == UserOptions(f"{module}:make", {"depth": 3})
    assert flags("--no-wide", run=run).task == UserOptions(f"{module}:make", {"depth": 3, "wide": False})
    assert loads(dump(run), methods=METHODS_HERE) == run
    with pytest.raises(ConfigError, match=r"task\.dept: there is no such option\n  expected  one of: depth, wide"):
        loads(f"[task]\nname = '{module}:make'\ndept = 3", methods=METHODS_HERE)
    with pytest.raises(ConfigError, match=r"\[task\]: .*:make lacks 'depth'"):
        loads(f"[task]\nname = '{module}:make'", methods=METHODS_HERE)
    with pytest.raises(ConfigError, match=r"task\.name: .* has no function 'other'"):
        loads(f"[task]\nname = '{module}:other'", methods=METHODS_HERE)


# ---- options


def test_options_of_a_dataclass_are_its_documented_fields():
    for kind in (Run, TextOptions, ImageOptions, HuggingFaceOptions, OptimizerOptions, SimulatedLink, TorchLink):
        for option in of_dataclass(kind).values():
            assert option.help, option.name
            assert option.help[-1] != "."


def test_bounds_of_every_kind():
    @dataclasses.dataclass(frozen=True)
    class Bounded:
        low: int = dataclasses.field(default=1, metadata=about("a", at_least=1))
        open: float = dataclasses.field(default=1.0, metadata=about("b", above=0))
        high: float = dataclasses.field(default=1.0, metadata=about("c", above=0, at_most=2))

        def __post_init__(self):
            check(self)

    Bounded(low=1, open=0.001, high=2.0)
    for name, value, expected in [
        ("low", 0, "at least 1"),
        ("open", 0.0, "above 0"),
        ("high", 2.5, "above 0 and at most 2"),
    ]:
        with pytest.raises(ConfigError) as caught:
            Bounded(**{name: value})
        assert caught.value.wrong == f"Bounded: {name} = {value}: {value} is out of range"
        assert caught.value.expected == f"a number {expected}"


def test_what_only_python_can_compose():
    with pytest.raises(ConfigError, match="--x 1: Run is nothing a file or a flag can hold"):
        read(Option("x", Run, None), "1", "--x 1", typed=True)


def test_a_number_or_a_word():
    option = Option("x", int | str, 0)
    assert read(option, "5", "", typed=True) == 5
    assert read(option, "five", "", typed=True) == "five"


# ---- documentation


def test_the_documentation_is_up_to_date():
    written = Path(__file__).parent.parent / "docs" / "configuration.md"
    assert written.read_text() == config_docs.markdown(), "python -m thinwire.config_docs > docs/configuration.md"


def test_the_documented_example_can_be_read():
    text = config_docs.markdown()
    example = text[text.index("```toml") + 7 : text.index("```\n", text.index("```toml") + 7)]
    assert loads(example).optimizer.options == {"weight_decay": 0.1}


@pytest.mark.parametrize("name", ["ddp", "diloco", "post_local_sgd", "streaming"])
def test_any_method_can_be_given_another_topology_and_rule(name):
    run = override(Run(), ["--method", name, "--topology", "islands(2, inside=bf16)", "--aggregator", "weighted_mean"])
    answers = run.method.build().answers()
    assert "Islands(size=2, between=Everyone(shares=()), inside=BF16())" in answers["topology"]
    assert answers["aggregator"] == "WeightedMean()"
    assert loads(dump(run)) == run
    own = override(Run(), ["--method", name]).method.build().answers()
    assert own["topology"] == "Everyone(shares=())"


@pytest.mark.parametrize(
    ("words", "outer"),
    [
        ("adam(0.01)", Adam(0.01)),
        ("scheduled(nesterov(0.7, 0.9), warmup=5, decay=40)", Scheduled(Nesterov(0.7, 0.9), warmup=5, decay=40)),
        (
            'restart(per_group(("*.bias", sgd(0.4)), rest=slowmo))',
            Restart(per_group(("*.bias", SGD(0.4)), rest=SlowMo())),
        ),
        ("clipped_momentum(1.0, 0.5, clip=0.1)", ClippedMomentum(1.0, 0.5, 0.1)),
    ],
)
def test_any_method_of_deltas_can_be_given_another_outer_step(words, outer):
    run = override(Run(), ["--method", "diloco", "--outer", words])
    assert run.method.build().outer == outer
    assert loads(dump(run)) == run


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--outer", "sdg(0.1)"], "outer 'sdg(0.1)': no outer step is called 'sdg'"),
        (
            ["--outer", "eager(adam)"],
            "outer 'eager(adam)': Adam(lr=0.01, betas=(0.9, 0.99), eps=0.001), made eager: a "
            "member's own part and the rest do not add up there",
        ),
        (["--topology", "ilands(2)"], "topology 'ilands(2)': no topology is called 'ilands'"),
        (["--aggregator", "trimmed_mean"], "aggregator 'trimmed_mean': trimmed_mean needs 'share'"),
        (
            ["--aggregator", "trimmed_mean(0.7)"],
            "aggregator 'trimmed_mean(0.7)': trimmed mean: share=0.7 leaves no value",
        ),
        (
            ["--topology", "pairs | pairs"],
            "topology 'pairs | pairs': 'pairs | pairs': a topology cannot be joined with |",
        ),
    ],
)
def test_answers_that_do_not_exist_are_refused(flags, text):
    with pytest.raises(ConfigError) as caught:
        override(Run(), flags).method.build()
    assert str(caught.value).splitlines()[0] == text

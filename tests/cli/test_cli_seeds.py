"""`thinwire export`, `import` and `replay`, from a run's folder to weights elsewhere."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from seed_samples import RECIPE, begun, frozen, grown, lived, tuned

from thinwire.errors import ConfigError, PacketError, StateMismatch
from thinwire.seeds.digests import digest
from thinwire.seeds.log import Closed, Log, updates
from thinwire.seeds.rebuild import apply
from thinwire.seeds.recipe import Recipe
from thinwire.seeds.sums import Sums


@pytest.fixture(scope="module")
def run():
    return lived(5)


@pytest.fixture
def folder(call, run):
    """What a run leaves behind, and a base beside it; the current folder is its own."""
    log, model = run
    Path("run").mkdir()
    Path("run/seeds.log").write_bytes(log.to_bytes())
    save_file({**model, **frozen()}, "run/model.safetensors")
    save_file({**tuned(), **frozen()}, "base.safetensors")
    Path("team.key").write_bytes(b"a key that nobody guesses")
    Path("other.key").write_bytes(b"a key that somebody else has")
    return Path("run")


def same(path: str, model: dict[str, torch.Tensor]) -> bool:
    found = load_file(path)
    return all(torch.equal(found[name], model[name]) for name in model)


def test_there_and_back(call, folder, run):
    log, model = run
    code, out, _ = call("export", "--seeds", "run", "away/tuned.log")
    size = Path("away/tuned.log").stat().st_size
    assert (code, out) == (0, f"away/tuned.log  {size} bytes, 5 rounds, result {log.result}\n")
    code, out, _ = call("import", "away/tuned.log", "--base", "base.safetensors", "--out", "new/tuned.safetensors")
    assert (code, out) == (
        0, f"new/tuned.safetensors  5 rounds, digest {log.result}: the run's own model, to the bit\n"
    )  # fmt: skip
    assert same("new/tuned.safetensors", {**model, **frozen()})


def test_signed(call, folder):
    assert "5 rounds, signed, result" in call("export", "--seeds", "run", "tuned.log", "--key", "team.key")[1]
    rest = ["tuned.log", "--base", "base.safetensors", "--out", "new.safetensors"]
    assert call("import", *rest, "--key", "team.key")[0] == 0
    with pytest.raises(ConfigError, match="the log was signed with another key"):
        call("import", *rest, "--key", "other.key")
    call("export", "--seeds", "run", "tuned.log")
    with pytest.raises(ConfigError, match="the log is not signed"):
        call("import", *rest, "--key", "team.key")


def test_a_run_that_noted_no_digest_gets_its_models(call, folder, run):
    (folder / "seeds.log").write_bytes(replace(run[0], checks={}).to_bytes())
    call("export", "--seeds", "run", "tuned.log")
    assert Log.from_bytes(Path("tuned.log").read_bytes()).result == run[0].result
    out = call("import", "run/seeds.log", "--base", "base.safetensors", "--out", "new.safetensors")[1]
    assert out.endswith(f"digest {run[0].result}: the log has no digest of it to compare with\n")


def test_export_without_seeds(call, folder):
    with pytest.raises(ConfigError) as caught:
        call("export", "run", "tuned.log")
    assert str(caught.value) == (
        "export run tuned.log: as what?\n"
        "  expected  --seeds: base digest, seeds and scalars\n"
        "  mend      add --seeds; the weights themselves are in run/model.safetensors already"
    )


def test_export_of_a_log_and_a_model_that_are_of_two_runs(call, folder, run):
    save_file({**tuned(), **frozen()}, folder / "model.safetensors")
    with pytest.raises(StateMismatch, match=f"expected  digest {run[0].result}, which seeds.log has after its last"):
        call("export", "--seeds", "run", "tuned.log")
    save_file(frozen(), folder / "model.safetensors")
    with pytest.raises(ConfigError, match=re.escape("run/model.safetensors has no tensor 'embed.weight'")):
        call("export", "--seeds", "run", "tuned.log")
    assert not Path("tuned.log").exists()


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        ("export --seeds nowhere tuned.log", "nowhere has no seeds.log"),
        ("export --seeds run base.safetensors/tuned.log", "base.safetensors: File exists"),
        ("export --seeds run tuned.log --key no.key", "no.key: No such file or directory"),
        ("import nothing --base base.safetensors --out new", "nothing: No such file or directory"),
        ("import run/seeds.log --base run/seeds.log --out new", "run/seeds.log: Error while deserializing header"),
        ("import run/seeds.log --base base.safetensors --out base.safetensors", "base.safetensors is the base itself"),
        ("import run/seeds.log --base run --out new", "the base is another one: the digest of its tuned tensors is"),
        ("replay nothing", "nothing: No such file or directory"),
        ("replay run/seeds.log --base run", "the base is another one: the digest of its tuned tensors is"),
        ("replay run/seeds.log --key team.key", "the log is not signed"),
    ],
)
def test_what_cannot_be_done(call, folder, words, wrong):
    with pytest.raises(ConfigError) as caught:
        call(*words.split())
    assert caught.value.wrong.startswith(wrong)


def test_a_log_that_is_none(call, folder):
    with pytest.raises(PacketError, match="this is no log of seeds"):
        call("replay", "base.safetensors")


# Replay --------------------------------------------------------------------------------------------------------------


def test_replay_tells_what_a_run_was(call, folder, run):
    code, out, _ = call("replay", "run/seeds.log")
    assert code == 0
    size = (folder / "seeds.log").stat().st_size
    for line in (
        "rounds   5, learning rates from 0.1 to 0.1",
        f"scalars  20 bytes said, {size} bytes of log",
        "members  2, 0 joined or left",
        f"base     {run[0].base}",
        f"result   {run[0].result}",
        "signed   no",
    ):
        assert line in out.splitlines()
    assert "replayed" not in out
    call("export", "--seeds", "run", "tuned.log", "--key", "team.key")
    assert "signed   yes (not checked: no --key)" in call("replay", "tuned.log")[1]
    assert "signed   yes (the key fits)" in call("replay", "tuned.log", "--key", "team.key")[1]


def test_replay_on_the_base(call, folder):
    code, out, _ = call("replay", "run/seeds.log", "--base", "base.safetensors")
    assert (code, out.splitlines()[-1]) == (0, "replayed on base.safetensors: 3 of 3 noted digests agree")


def test_replay_says_where_they_part(call, folder, run):
    log, _ = run
    rounds = list(log.rounds)
    rounds[3] = replace(rounds[3], codes={**rounds[3].codes, 1: b"\x45\x45"})
    Path("changed.log").write_bytes(replace(log, rounds=tuple(rounds)).to_bytes())
    with pytest.raises(StateMismatch) as caught:
        call("replay", "changed.log", "--base", "base.safetensors")
    assert caught.value.wrong.startswith("after 4 rounds the log gives a model with the digest ")
    assert caught.value.expected == f"digest {log.checks[4]}, which the run noted then"
    assert caught.value.mend == "look between rounds 2 and 4: up to 2 they agree"


def pooled(wrong: bool = False) -> None:
    """A log of sums, as `pool.log`, on base.safetensors."""
    log = replace(begun(Recipe(rounding="nearest")), sums=Sums(7, (0, 3 << 32, -(5 << 30))))
    model = tuned()
    apply(list(model.items()), list(updates(log)), log.recipe)
    log = log.checked("0" * 32 if wrong else digest(model.items()))
    Path("pool.log").write_bytes(log.to_bytes())


def test_a_pool_there_and_back(call, folder):
    pooled()
    code, out, _ = call("import", "pool.log", "--base", "base.safetensors", "--out", "new.safetensors")
    assert code == 0
    assert re.fullmatch(r"new.safetensors  a pool of 3 directions, digest \w+: the run's own model, to the bit\n", out)


def test_replay_of_a_pool_on_the_base(call, folder):
    pooled()
    code, out, _ = call("replay", "pool.log", "--base", "base.safetensors")
    assert code == 0
    assert "pool     3 directions, 2 taken" in out
    assert "member" not in out
    assert out.endswith("1 of 1 noted digests agree\n")
    told = json.loads(call("replay", "pool.log", "--json")[1])
    assert told["pool"] == {"directions": 3, "taken": 2}


def test_replay_of_a_pool_says_that_it_is_another_model(call, folder):
    pooled(wrong=True)
    with pytest.raises(StateMismatch, match=r"after a pool of 3 directions the log(?s:.)*sums do not say where"):
        call("replay", "pool.log", "--base", "base.safetensors")


def test_a_folder_is_no_file_to_write(call, folder):
    with pytest.raises(ConfigError, match=r"run is a folder(?s:.)*--out run/model.safetensors"):
        call("import", "run/seeds.log", "--base", "base.safetensors", "--out", "run")


def test_replay_tells_who_was_silent_and_who_was_wild(call, folder):
    """Member 7 abstains in its second round, member 8 says the top every time, member 9 says 0."""
    log = grown(begun(replace(RECIPE, samples=2)), 20)
    for number, silent in ((20, b"\x31\xb3"), (21, b"\x80\x80")):
        told = {0: b"\x3a\xb2", 1: b"\x33\xb3", 7: silent, 8: b"\x7f\xff", 9: b"\0\0"}
        log = log.append(Closed(number, 0.1, told, joined=(7, 8, 9) if number == 20 else ()))
    log = log.append(Closed(22, 0.1, {0: b"\x33\xb3"}, left=(1, 7, 8, 9)))
    Path("long.log").write_bytes(log.to_bytes())
    told = json.loads(call("replay", "long.log", "--json")[1])
    assert (told["rounds"], told["changes"], told["scalar_bytes"]) == (23, 7, 40 * 2 + 2 * 10 + 2)
    assert told["members"]["7"] == {"rounds": 2, "scalars": 4, "abstained": 2, "zero": 0, "wild": 0}
    assert told["members"]["8"] == {"rounds": 2, "scalars": 4, "abstained": 0, "zero": 0, "wild": 4}
    assert told["members"]["9"] == {"rounds": 2, "scalars": 4, "abstained": 0, "zero": 4, "wild": 0}
    assert told["members"]["0"]["rounds"] == 23
    rows = [line.split() for line in call("replay", "long.log")[1].splitlines()]
    assert ["8", "2", "4", "0", "0", "4"] in rows


def test_replay_as_json(call, folder, run):
    told = json.loads(call("replay", "run/seeds.log", "--base", "base.safetensors", "--json")[1])
    assert told["recipe"] == RECIPE.as_dict()
    assert [check["rounds"] for check in told["checks"]] == [2, 4, 5]
    assert (told["base"], told["result"], told["signed"]) == (run[0].base, run[0].result, False)

"""A state on show, and the newcomer who fetches it: copies that hold nobody up, bounded in every way."""

from __future__ import annotations

import builtins
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from test_pieces import same

from thinwire.elastic import fetching
from thinwire.elastic.exhibit import Bucket, Exhibit, routes, serve
from thinwire.elastic.fetching import fetch
from thinwire.elastic.handing import Shelf, hand_over
from thinwire.elastic.pieces import cut
from thinwire.errors import ConfigError, LinkError, PacketError
from thinwire.links import local
from thinwire.units import Rate

pytest.importorskip("starlette", reason="states are served by starlette and uvicorn: pip install 'thinwire[elastic]'")
pytest.importorskip("uvicorn", reason="states are served by starlette and uvicorn: pip install 'thinwire[elastic]'")

TOKEN = "open sesame"
FAST = Rate(1e12)


def state(step=0, tensors=8, size=1000):
    """All tensors but the first are the same at every step."""
    return {"anchor": [torch.full((size,), float(step)), *(torch.arange(size) + 0.5 * n for n in range(1, tensors))]}


def exhibit(step=0, made=None, **options):
    """One that shows a state already."""
    shown = Exhibit(FAST, **options)
    shown.states()
    assert shown.publish(step, lambda: state(step) if made is None else made)
    return shown


@contextmanager
def served(*exhibits):
    with ExitStack() as stack:
        yield [stack.enter_context(serve(each, TOKEN)) for each in exhibits]


def ask(address, path, body=None, token=TOKEN):
    request = urllib.request.Request(f"http://{address}{path}", body, {"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read()


# --- what is shown ---------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def steps(shown):
    return [each["step"] for each in shown.states()]


def read(shown, step):
    """As a reader does: the manifest of a step, which makes it one that is being read."""
    (digest,) = [each["digest"] for each in shown.states() if each["step"] == step]
    assert shown.manifest(digest)


def test_nothing_is_copied_until_somebody_asks():
    shown = Exhibit()
    assert not shown.publish(1, lambda: pytest.fail("nobody asked"))
    assert steps(shown) == []
    assert shown.wanted
    assert shown.publish(2, lambda: state(2))
    assert not shown.wanted
    assert not shown.publish(3, lambda: pytest.fail("nobody asked again"))
    assert steps(shown) == [2]


def test_what_is_shown_is_a_copy():
    live = state()
    shown = exhibit(made=live)
    live["anchor"][0].fill_(9)
    assert shown.states()[0]["digest"] == cut(state()).manifest.digest


def test_the_newest_replaces_the_last_unless_that_is_read():
    shown = exhibit(1)
    assert steps(shown) == [1]
    shown.publish(2, lambda: state(2))
    assert steps(shown) == [2]
    read(shown, 2)
    shown.publish(3, lambda: state(3))
    assert steps(shown) == [2, 3]
    shown.publish(4, lambda: state(4))
    assert steps(shown) == [2, 4]


def test_two_that_are_read_stay_and_nothing_is_published_until_one_is_not():
    clock = Clock()
    shown = exhibit(1, clock=clock)
    read(shown, 1)
    shown.publish(2, lambda: state(2))
    read(shown, 2)
    assert not shown.publish(3, lambda: pytest.fail("there is no room"))
    clock.now = 29.0
    read(shown, 2)
    clock.now = 31.0
    assert shown.publish(4, lambda: state(4))
    assert steps(shown) == [2, 4]


def test_a_step_may_be_published_twice():
    """A run that went back to a checkpoint comes to the same step again, with another state."""
    shown = exhibit(1)
    read(shown, 1)
    shown.publish(1, lambda: state(2))
    assert not shown.publish(2, lambda: pytest.fail("nobody asked again"))
    assert steps(shown) == [1, 1]


def test_a_copy_is_thrown_away_if_its_place_was_taken_meanwhile():
    """As the third state is copied somebody begins to read the second, and the first is read already."""
    shown = exhibit(1)
    read(shown, 1)
    shown.publish(2, lambda: state(2))
    assert steps(shown) == [1, 2]

    def copied():
        read(shown, 2)
        return state(3)

    assert not shown.publish(3, copied)
    assert steps(shown) == [1, 2]
    assert shown.wanted


def test_a_piece_that_is_asked_for_keeps_its_state_on_show():
    clock = Clock()
    shown = exhibit(1, clock=clock)
    read(shown, 1)
    (digest, *_) = cut(state(1)).views
    clock.now = 20.0
    assert shown.piece(digest) is not None
    clock.now = 45.0
    steps(shown)
    shown.publish(2, lambda: state(2))
    assert steps(shown) == [1, 2]


def test_what_nobody_reads_is_forgotten():
    clock = Clock()
    shown = exhibit(1, clock=clock)
    clock.now = 29.0
    shown.publish(2, lambda: state(2))
    assert [each.step for each in shown._held] == [1]
    clock.now = 31.0
    shown.publish(3, lambda: state(3))
    assert shown._held == []


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan")])
def test_a_share_that_cannot_be(share):
    with pytest.raises(ConfigError, match="a share of"):
        Exhibit(share=share)


def test_an_uplink_that_cannot_be():
    with pytest.raises(ConfigError, match="an uplink of"):
        Exhibit(Rate(0.0))


# --- the rate --------------------------------------------------------------------------------------------------------


def test_a_bucket_spreads_what_is_taken_and_saves_nothing_up():
    bucket = Bucket(100.0)
    assert [bucket.take(50, 0.0) for _ in range(3)] == [0.0, 0.5, 1.0]
    assert bucket.take(50, 1.25) == 0.25
    assert bucket.take(50, 100.0) == 0.0
    assert bucket.take(50, 100.0) == 0.5


def test_readers_have_a_share_of_the_uplink():
    assert Exhibit(Rate(80e6)).bucket.bytes_per_s == pytest.approx(3e6)
    shown = Exhibit(Rate(80e6), share=0.5)
    assert shown.bucket.bytes_per_s == 5e6
    shown.measured(Rate(8e6))
    assert shown.bucket.bytes_per_s == 5e5


def test_all_that_is_read_goes_through_the_bucket():
    taken = []

    class Counting(Bucket):
        def take(self, size, now):
            taken.append(size)
            return super().take(size, now)

    made = state(size=50_000)
    shown = exhibit(made=made)
    shown.bucket = Counting(1e12)
    with served(shown) as addresses:
        got = fetch(addresses, TOKEN, Shelf())
    manifest = cut(made).manifest
    assert sum(taken) == got.progress.total_bytes + len(manifest.text)
    assert max(taken) == 64 << 10


# --- the service -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "body"), [("/state", None), ("/state/abc", None), ("/pieces", b"abc")])
@pytest.mark.parametrize("token", ["", "open sesam", "open sesame!", "é"])
def test_every_path_wants_the_token(path, body, token):
    with served(exhibit()) as (address,):
        with pytest.raises(urllib.error.HTTPError) as caught:
            ask(address, path, body, token.encode().decode("latin-1"))
        assert caught.value.code == 401


def test_what_is_not_shown_is_not_found():
    with served(exhibit()) as (address,):
        digest = next(iter(cut(state()).views))
        for path, body in (("/state/abc", None), ("/pieces", f"{digest}\nabc".encode())):
            with pytest.raises(urllib.error.HTTPError) as caught:
                ask(address, path, body)
            assert caught.value.code == 404
        with pytest.raises(urllib.error.HTTPError) as caught:
            ask(address, "/pieces", b"x" * 65 * 4097)
        assert caught.value.code == 413


def test_a_question_for_too_much_is_refused():
    large = {"a": torch.zeros(1 << 20), "b": [torch.ones(1)]}
    shown = exhibit(made=large)
    with served(shown) as (address,):
        read(shown, 0)
        digest = cut(large).manifest.cuts[0].digests[0]
        assert len(ask(address, "/pieces", digest.encode())) == 4 << 20
        with pytest.raises(urllib.error.HTTPError) as caught:
            ask(address, "/pieces", "\n".join([digest] * 5).encode())
        assert caught.value.code == 413


def test_a_service_without_a_token_or_a_place():
    with pytest.raises(ConfigError, match="an empty token"):
        routes(Exhibit(), "")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(LinkError, match=f"nothing can listen at 127.0.0.1:{port}"),
            serve(Exhibit(), TOKEN, port=port),
        ):
            pass


@pytest.mark.parametrize("absent", ["starlette", "uvicorn"])
def test_without_the_extra_it_is_named(monkeypatch, absent):
    real = builtins.__import__

    def lacking(name, *arguments, **named):
        if name.split(".")[0] == absent:
            raise ImportError(f"No module named {absent!r}", name=absent)
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", lacking)
    with (
        pytest.raises(ConfigError, match=rf"{absent} is not installed(.|\n)*thinwire\[elastic\]"),
        serve(Exhibit(), TOKEN),
    ):
        pass


# --- fetching --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("donors", [1, 3])
def test_a_state_is_fetched_to_the_bit(donors):
    told = []
    with served(*(exhibit(5) for _ in range(donors))) as addresses:
        got = fetch(addresses, TOKEN, Shelf(), tell=told.append)
    same(got.state, state(5))
    assert got.step == 5
    assert got.digest == cut(state(5)).manifest.digest
    total = sum(cut(state(5)).manifest.sizes.values())
    assert (got.progress.received_bytes, got.progress.known_bytes, got.progress.total_bytes) == (total, 0, total)
    assert sum(got.given.values()) == total
    assert got.given.keys() <= set(addresses)
    received = [each.received_bytes for each in told]
    assert received == sorted(received)
    assert received[0] == 0
    assert received[-1] == total


def test_several_donors_give():
    """Each is asked for at most its share of what is missing: a third gets nothing only if it never answers."""
    barrier = threading.Barrier(3, timeout=20)

    class Together(Exhibit):
        met = False

        def piece(self, digest):
            if not self.met:
                self.met = True
                barrier.wait()
            return super().piece(digest)

    exhibits = []
    for _ in range(3):
        shown = Together(FAST)
        shown.states()
        shown.publish(0, lambda: state(tensors=30))
        exhibits.append(shown)
    with served(*exhibits) as addresses:
        got = fetch(addresses, TOKEN, Shelf())
    assert got.given.keys() == set(addresses)


def test_the_rest_is_fetched_after_a_cut_by_another_process(tmp_path):
    """The tenth piece does not arrive in time: the second process asks for the others only."""
    made = state(tensors=20)

    def cut_short(progress):
        if progress.received_bytes >= 10 * 4000:
            raise KeyboardInterrupt

    with served(exhibit(made=made)) as addresses:
        with pytest.raises(KeyboardInterrupt):
            fetch(addresses, TOKEN, Shelf(folder=tmp_path), tell=cut_short)
        got = fetch(addresses, TOKEN, Shelf(folder=tmp_path))
    same(got.state, made)
    assert got.progress.known_bytes == 10 * 4000
    assert got.progress.received_bytes == 10 * 4000


def test_in_the_gathering_only_what_changed_since_crosses():
    shelf = Shelf()
    with served(exhibit(5)) as addresses:
        fetch(addresses, TOKEN, shelf)
    now = state(6)

    def work(link):
        given = (now, None) if link.rank == 0 else (None, None)
        got = hand_over(link, (0,), (1,), *given, shelf if link.rank == 1 else Shelf())
        return got, link.meter.total().received_bytes

    _, ((common, _), received_bytes) = local.run(2, work)
    same(common, now)
    assert 4000 < received_bytes < 4000 + 3000


def test_the_newest_that_most_members_show_is_taken():
    with served(exhibit(7), exhibit(6), exhibit(6)) as addresses:
        got = fetch(addresses, TOKEN, Shelf())
    assert got.step == 6
    assert got.given.keys() <= set(addresses[1:])


def test_the_newest_of_all_is_taken_if_most_do_not_come_to_one(monkeypatch):
    monkeypatch.setattr(fetching, "_AGREE_S", 0.0)
    with served(exhibit(5), exhibit(7), exhibit(6)) as addresses:
        assert fetch(addresses, TOKEN, Shelf()).step == 7


def test_a_state_is_waited_for():
    """A reader's question is what has one published: a trainer that goes on is enough."""
    shown, done = Exhibit(FAST), threading.Event()

    def trainer():
        step = 0
        while not done.wait(0.01):
            step += 1
            shown.publish(step, partial(state, step))

    thread = threading.Thread(target=trainer)
    with served(shown) as addresses:
        thread.start()
        try:
            got = fetch(addresses, TOKEN, Shelf(), answers_s=30.0)
        finally:
            done.set()
            thread.join()
    same(got.state, state(got.step))


def test_members_that_are_gone_do_not_matter_while_one_answers():
    with served(exhibit(1)) as (address,):
        same(fetch([free_address(), address], TOKEN, Shelf()).state, state(1))


def free_address():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def test_a_donor_that_vanishes_in_the_middle_is_replaced():
    """The first donor gives two pieces of what it was asked for and closes; the other one gives the rest."""
    made = state(tensors=24)

    class Dying(Exhibit):
        def piece(self, digest):
            piece = super().piece(digest)
            return piece if digest in early else None

    early = list(cut(made).views)[:2]
    dying = Dying(FAST)
    dying.states()
    dying.publish(0, lambda: made)
    with served(dying, exhibit(made=made)) as addresses:
        got = fetch(addresses, TOKEN, Shelf())
    same(got.state, made)
    assert got.given[addresses[1]] >= 22 * 4000


class Scripted:
    """A service that answers as a test says: (path, body, count) -> (status, bytes, bytes it says it has)."""

    def __init__(self, script):
        counts = {}

        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                kind = self.path[:7]
                counts[kind] = counts.get(kind, -1) + 1
                status, content, length = script(self.path, body, counts[kind])
                self.send_response(status)
                self.send_header("content-length", str(length))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = answer  # noqa: N815

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return f"127.0.0.1:{self.server.server_address[1]}"

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()


def honest(made, *, spoil=lambda pieces, count: pieces, listing=None, refuse=0, log=None):
    """A service that shows a state; `spoil` changes what it answers to the n-th question for pieces.

    refuse  questions for pieces that find nothing, at first
    log     list of the paths asked for
    """
    held = cut(made)
    told = {"format": "thinwire-state-1", "states": [{"step": 0, "digest": held.manifest.digest, "bytes": 0}]}
    told = json.dumps(told).encode() if listing is None else listing

    def script(path, body, count):
        if log is not None:
            log.append(path)
        if path == "/pieces" and count < refuse:
            return 404, b"", 0
        if path == "/pieces":
            whole = b"".join(bytes(held.views[digest]) for digest in body.decode().split())
            return 200, spoil(whole, count), len(whole)
        content = told if path == "/state" else held.manifest.text
        return 200, content, len(content)

    return Scripted(script)


def test_an_answer_that_breaks_off_is_gone_on_with():
    """The first answer ends in its third piece: two are kept, and the rest is asked for again."""
    with honest(state(), spoil=lambda whole, count: whole[:10_000] if count == 0 else whole) as address:
        got = fetch([address], TOKEN, Shelf())
    same(got.state, state())
    assert got.progress.received_bytes == 8 * 4000


def test_a_donor_that_breaks_off_again_and_again_is_given_up(monkeypatch):
    """A piece that never arrives whole: the state is asked for anew until time is up."""
    monkeypatch.setattr(fetching, "_POLL_S", 0.01)
    told = "0 of 32000 missing bytes of a state arrived within 1 s"
    with honest(state(), spoil=lambda whole, count: b"") as address, pytest.raises(LinkError, match=told):
        fetch([address], TOKEN, Shelf(), limit_s=1.0)


def test_a_donor_that_shows_the_state_no_more_is_asked_what_it_shows():
    log = []
    with honest(state(), refuse=1, log=log) as address:
        got = fetch([address], TOKEN, Shelf())
    same(got.state, state())
    assert [path for path in log if path in ("/state", "/pieces")] == ["/state", "/pieces", "/state", "/pieces"]


def test_a_damaged_piece_is_asked_for_again():
    def spoil(whole, count):
        return b"\xff" + whole[1:] if count == 0 else whole

    with honest(state(), spoil=spoil) as address:
        same(fetch([address], TOKEN, Shelf()).state, state())


def test_a_donor_with_bad_memory_is_found_out_and_another_gives():
    with honest(state(), spoil=lambda whole, count: b"\xff" * len(whole)) as bad, honest(state()) as good:
        got = fetch([bad, good], TOKEN, Shelf())
    same(got.state, state())
    assert got.given.keys() == {good}


def test_a_piece_that_comes_damaged_three_times_is_given_up():
    bad = honest(state(), spoil=lambda whole, count: b"\xff" * len(whole))
    with bad as address, pytest.raises(PacketError, match="was changed on the way"):
        fetch([address], TOKEN, Shelf())


def test_a_wrong_token_is_said_at_once():
    with served(exhibit()) as addresses, pytest.raises(ConfigError, match=f"{addresses[0]} does not take this token"):
        fetch(addresses, "another", Shelf())


def test_nobody_answers():
    address = free_address()
    with pytest.raises(LinkError, match=f"nobody answers at {address}"):
        fetch([address], TOKEN, Shelf(), answers_s=0.3)


def test_nobody_publishes():
    with served(Exhibit()) as addresses, pytest.raises(LinkError, match=r"no member showed a state within 0.3 s"):
        fetch(addresses, TOKEN, Shelf(), answers_s=0.3)


@pytest.mark.parametrize(
    ("listing", "told"),
    [
        (b'{"format": "thinwire-state-9", "states": []}', "shows states of format 'thinwire-state-9'"),
        (b"<html>", "shows no states"),
        (b"[]", "shows no states"),
        (b'{"format": "thinwire-state-1", "states": [{"step": 1}]}', "shows no states"),
        (b" " * 70_000, "answers with 70000 bytes"),
    ],
)
def test_what_is_no_member_is_said_at_once(listing, told):
    with honest(state(), listing=listing) as address, pytest.raises(PacketError, match=told):
        fetch([address], TOKEN, Shelf())


def test_a_redirection_is_not_followed():
    """A token goes nowhere else."""
    asked = []

    def elsewhere(path, body, count):
        asked.append(path)
        return 200, b"{}", 2

    with Scripted(elsewhere) as there:

        def script(path, body, count):
            return 302, b"", 0

        with Scripted(script) as address, pytest.raises(LinkError, match="nobody answers"):
            fetch([address], TOKEN, Shelf(), answers_s=0.1)
        assert there
    assert not asked


def test_silence_is_bounded():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(LinkError, match="nobody answers"):
            fetch([address], TOKEN, Shelf(), answers_s=0.1, silence_s=0.2)
        assert time.monotonic() - began < 60


@pytest.mark.parametrize(("addresses", "told"), [([], "no addresses"), (["nowhere"], "address 'nowhere'")])
def test_addresses_that_cannot_be(addresses, told):
    with pytest.raises(ConfigError, match=told):
        fetch(addresses, TOKEN, Shelf())

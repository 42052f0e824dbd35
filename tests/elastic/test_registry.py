"""Each member's HTTP service, who may ask it, and the page in a real browser."""

import json
import shutil
import subprocess
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

pytest.importorskip("starlette", reason="a registry needs the extra 'elastic'")
pytest.importorskip("uvicorn", reason="a registry needs the extra 'elastic'")

from starlette.responses import PlainTextResponse
from starlette.routing import Route

from thinwire.elastic.board import WITH_OTHERS, Board, Said, address_number, address_text, waiting
from thinwire.elastic.registry import Registry, get
from thinwire.errors import ConfigError, LinkError

TOKEN = "sesame"
FACTS = {"id": "c0ffee", "version": "0.1.0", "toml": "steps = 9\n", "lighthouses": ["127.0.0.1:9"], "steps": 400,
         "method": "diloco", "task": "text"}  # fmt: skip


def said(**changed) -> Said:
    values = {"lease": 3, "used": 50, "leaves": False, "loss": 2.5, "units_per_s": 12.5, "sent_bytes": 7_000_000,
              "received_bytes": 8_000_000, "address": ""}  # fmt: skip
    return Said(**values | changed)


def board(name: str = "a-1", **more) -> Board:
    made = Board(name, FACTS, **more)
    made.met(["a-1", "b-2", "c-3"], came=["c-3"])
    for step in (50, 100, 150):
        told = {each: said(loss=3.0 - step / 100) for each in ("a-1", "b-2", "c-3")}
        made.round(step, told, {"a-1": 50, "b-2": 30, "c-3": 20}, round=step // 50 - 1, epochs_done=1, units_done=420,
                   units_per_epoch=300)  # fmt: skip
    made.phase(WITH_OTHERS, 150)
    return made


@pytest.fixture
def serve():
    """serve(board): its service, closed after the test."""
    open_ = []

    def begin(of: Board, **more) -> Registry:
        open_.append(Registry("127.0.0.1", 0, of, TOKEN, **more))
        of.address = open_[-1].address
        return open_[-1]

    yield begin
    for each in open_:
        each.close()


def test_the_run_for_a_newcomer(serve):
    of = board()
    address = serve(of).address
    found = get(address, "/run", TOKEN)
    assert FACTS.items() <= found.items()
    assert (found["step"], found["holds"], found["ended"]) == (150, True, None)
    assert found["members"] == {"a-1": address, "b-2": "", "c-3": ""}


def test_before_the_first_meeting_nothing_is_held(serve):
    assert get(serve(Board("a", FACTS)).address, "/run", TOKEN)["holds"] is False


@pytest.mark.parametrize("path", ["/run", "/status", "/own", "/pieces"])
@pytest.mark.parametrize("token", ["", "Sesame", "sesame2", "s\u00e9same".encode().decode("latin-1")])
def test_without_the_token_nothing_is_told(serve, path, token):
    route = Route("/pieces", lambda request: PlainTextResponse('"secret"'))
    with pytest.raises(ConfigError, match="does not know this token"):
        get(serve(board(), routes=[route]).address, path, token)


def test_a_refusal_is_a_sentence(serve):
    address = serve(board()).address
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"http://{address}/status")
    assert caught.value.code == 401
    assert json.loads(caught.value.read()) == {
        "error": "no token, or not this run's: give the one that `thinwire up` printed (--token T)"
    }


def test_others_routes_are_mounted(serve):
    route = Route("/pieces", lambda request: PlainTextResponse('{"digest": 1}'))
    assert get(serve(board(), routes=[route]).address, "/pieces", TOKEN) == {"digest": 1}


def test_the_page_needs_no_token_and_fetches_nothing_of_others(serve):
    with urllib.request.urlopen(f"http://{serve(board()).address}/") as answer:
        text, policy = answer.read().decode(), answer.headers["Content-Security-Policy"]
    assert "sesame" not in text
    assert "connect-src 'self'" in policy
    assert "://" not in text.replace("http://www.w3.org/2000/svg", "")


def test_status_is_of_all_with_the_others_present(serve):
    other = board("b-2")
    other.phase("computing", 170)
    theirs = serve(other)
    mine = board()
    told = {"a-1": said(), "b-2": said(address=theirs.address), "c-3": said(loss=None)}
    mine.round(160, told, {}, round=3)
    view = get(serve(mine).address, "/status", TOKEN)
    a, b, c = view["members"]
    assert [row["answers"] for row in view["members"]] == [True, True, False]
    assert (a["phase"], b["phase"], c["phase"]) == (WITH_OTHERS, "computing", None)
    assert (a["step"], b["step"], c["step"]) == (150, 170, 160)
    assert [row["share"] for row in view["members"]] == [0.5, 0.3, 0.2]
    assert c["loss"] == 1.5, "the last that it told"
    assert view["waiting"]["for"] == ["b-2", "c-3"]
    assert view["curve"][-1] == [160, 2.5]


def test_another_life_at_an_address_is_not_taken_for_the_member(serve):
    stranger = serve(Board("x-9", FACTS))
    mine = board()
    mine.round(160, {"b-2": said(address=stranger.address)}, {})
    assert not get(serve(mine).address, "/status", TOKEN)["members"][1]["answers"]


def test_findings_and_changes(serve):
    of = board()
    of.find("slow", "b-2", "2.1 s a step, the others 0.4 s")
    view = get(serve(of).address, "/status", TOKEN)
    assert view["changes"][0]["came"] == ["c-3"]
    assert view["findings"][0]["evidence"] == "2.1 s a step, the others 0.4 s"


def test_a_number_that_is_none_is_null(serve):
    of = board()
    of.tell(valid_loss=float("nan"))
    assert get(serve(of).address, "/status", TOKEN)["run"]["valid_loss"] is None


@pytest.mark.parametrize(("address", "there"), [("127.0.0.1:29400", True), ("203.0.113.7:1", True), ("host:9", False),
                                                ("[::1]:9", False), ("", False)])  # fmt: skip
def test_addresses_fit_a_number(address, there):
    number = address_number(address)
    assert address_text(number) == (address if there else "")
    assert number < 1 << 63


def test_what_is_said_fits_eight_whole_numbers():
    for one in (said(), said(loss=None, leaves=True, address="10.0.0.9:4"), said(loss=0.0)):
        numbers = one.numbers()
        assert len(numbers) == 8
        assert all(isinstance(number, int) and abs(number) < 1 << 63 for number in numbers)
        assert Said.of(numbers) == one
    assert Said.of(said(loss=float("inf")).numbers()).loss == 1e12


def test_nobody_waits_where_all_compute():
    rows = [{"name": "a", "phase": "computing", "since": 3.0}, {"name": "b", "phase": "computing", "since": 4.0}]
    assert waiting(rows) is None
    rows[1]["phase"] = WITH_OTHERS
    assert waiting(rows) == {"for": ["a"], "since": 4.0}
    rows[0]["phase"] = "ended"
    assert waiting(rows) is None


def test_nobody_there(serve):
    registry = serve(board())
    registry.close()
    with pytest.raises(LinkError, match=f"nobody answers at {registry.address}"):
        get(registry.address, "/run", TOKEN)


@pytest.mark.parametrize("address", ["here", "host:", "host:x", "a/b:3"])
def test_what_is_no_address(address):
    with pytest.raises(ConfigError, match="address"):
        get(address, "/run", TOKEN)


def test_what_is_no_member():
    class Other(BaseHTTPRequestHandler):
        def do_GET(self):
            code = 404 if self.path == "/own" else 200
            self.send_response(code)
            self.end_headers()
            self.wfile.write(b"<p>a page</p>")

        def log_message(self, *words):
            pass

    server = HTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"127.0.0.1:{server.server_port}"
    try:
        with pytest.raises(ConfigError, match="answers, but not as a member of a thinwire run"):
            get(address, "/run", TOKEN)
        with pytest.raises(ConfigError, match="answers 404"):
            get(address, "/own", TOKEN)
    finally:
        server.shutdown()
        server.server_close()


def test_a_port_that_is_taken(serve):
    port = int(serve(board()).address.rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"127.0.0.1:{port} cannot be listened at"):
        Registry("127.0.0.1", port, board(), TOKEN)


def browser(tmp_path, url: str, *flags: str) -> str:
    found = shutil.which("chromium")
    if found is None:
        pytest.skip("there is no browser: `chromium` is not installed")
    command = [found, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}",
               "--virtual-time-budget=3000", *flags, url]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.partition("<script>")[0]


@pytest.mark.slow
def test_the_page_shows_the_run(serve, tmp_path):
    of = board()
    of.find("slow", "b-2", "<b>2.1 s</b> a step")
    text = browser(tmp_path, f"http://{serve(of).address}/#{TOKEN}", "--dump-dom")
    assert "diloco on text" in text
    assert ">150<" in text
    assert "Waiting for b-2, c-3 for" in text
    assert "does not answer" in text
    assert "&lt;b&gt;2.1 s&lt;/b&gt;" in text, "what members say is text, never markup"
    assert "polyline" in text


@pytest.mark.slow
def test_the_page_asks_for_the_token(serve, tmp_path):
    text = browser(tmp_path, f"http://{serve(board()).address}/#wrong", "--dump-dom")
    assert "That was not this run's token." in text
    assert "does not answer" not in text

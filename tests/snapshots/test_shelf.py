"""The two-version rule by hand: a snapshot replaces the older one when it is whole, and not before."""

from __future__ import annotations

import itertools

import pytest

from thinwire.errors import ConfigError
from thinwire.snapshots.keeper import Watch
from thinwire.snapshots.shelf import Shelf


class Pages:
    """Memory that counts what is out."""

    def __init__(self, most: int = 10**9) -> None:
        self.out: dict[str, int] = {}
        self.made, self.most = itertools.count(), most

    def __call__(self, size: int) -> Page:
        if sum(self.out.values()) + size > self.most:
            raise OSError(28, "No space left on device")
        return Page(self, size)


class Page:
    def __init__(self, pages: Pages, size: int) -> None:
        self.name, self._pages = f"page {next(pages.made)}", pages
        pages.out[self.name] = size

    def digest(self, size: int) -> str:
        return f"digest of {self.name}:{size}"

    def free(self) -> None:
        del self._pages.out[self.name]


def put(shelf: Shelf, version: int, *, parts: int = 2, size: int = 10, stop_before: int | None = None) -> None:
    """A snapshot that arrives part by part, to its end or to where its writer stops."""
    shelf.begin("a", version, f"note {version}", dict.fromkeys(range(parts), size))
    for number in range(parts):
        if number == stop_before:
            return
        shelf.arrived("a", version, number)


def versions(shelf: Shelf) -> list[tuple[int, bool]]:
    return [(held.version, held.in_force) for held in shelf.held("a")]


def test_a_snapshot_replaces_the_older_one():
    shelf = Shelf(Pages())
    assert versions(shelf) == []
    put(shelf, 1)
    assert versions(shelf) == [(1, False)]
    shelf.promote("a", 1)
    assert versions(shelf) == [(1, True)]
    put(shelf, 2)
    assert versions(shelf) == [(2, False), (1, True)], "complete ones can be read, the older one stands"
    shelf.promote("a", 2)
    assert versions(shelf) == [(2, True)]
    assert shelf.owners() == ["a"]
    assert shelf.held("a")[0].note == "note 2"


@pytest.mark.parametrize("stop_before", [0, 1, 2])
def test_whoever_stops_in_the_middle_leaves_the_older_one_in_force(stop_before):
    shelf = Shelf(Pages())
    put(shelf, 1, parts=3)
    shelf.promote("a", 1)
    put(shelf, 2, parts=3, stop_before=stop_before)
    lacking = ", ".join(map(str, range(stop_before, 3)))
    with pytest.raises(ConfigError, match=f"snapshot 2 of 'a' lacks part {lacking}\n"):
        shelf.promote("a", 2)
    assert versions(shelf) == [(1, True)]
    put(shelf, 3, parts=3)
    shelf.promote("a", 3)
    assert versions(shelf) == [(3, True)]


def test_versions_ascend_and_only_the_one_begun_last_arrives():
    shelf = Shelf(Pages())
    put(shelf, 5)
    shelf.promote("a", 5)
    with pytest.raises(ConfigError, match="snapshot 5 of 'a' comes after 5"):
        shelf.begin("a", 5, "", {0: 1})
    with pytest.raises(ConfigError, match="snapshot 6 of 'a' is not arriving: none is"):
        shelf.promote("a", 6)
    shelf.begin("a", 6, "", {0: 1})
    shelf.begin("a", 7, "", {0: 1})
    with pytest.raises(ConfigError, match="snapshot 6 of 'a' is not arriving: 7 is"):
        shelf.arrived("a", 6, 0)


def test_memory_is_that_of_two_snapshots_and_is_used_again():
    pages = Pages(most=40)
    shelf = Shelf(pages)
    for version in range(5):
        put(shelf, version, stop_before=1 if version == 2 else None)
        if version != 2:
            shelf.promote("a", version)
        assert sum(pages.out.values()) <= 40
    assert next(pages.made) == 4, "no page is made a second time"
    put(shelf, 9, size=5)
    shelf.promote("a", 9)
    assert sum(pages.out.values()) == 30, "of the sizes before, one snapshot is kept as spare"
    put(shelf, 10, size=5)
    assert sum(pages.out.values()) == 20
    shelf.close()
    assert pages.out == {}


def test_where_memory_is_short_the_snapshot_in_force_stands():
    pages = Pages(most=30)
    shelf = Shelf(pages)
    put(shelf, 1)
    shelf.promote("a", 1)
    with pytest.raises(OSError, match="No space"):
        put(shelf, 2)
    assert versions(shelf) == [(1, True)]
    assert sum(pages.out.values()) == 20, "what was had of the new one is given back"


def test_owners_are_apart():
    shelf = Shelf(Pages())
    put(shelf, 1)
    shelf.begin("b", 1, "", {3: 7})
    shelf.arrived("b", 1, 3)
    shelf.forget("a")
    assert shelf.owners() == ["b"]
    assert shelf.held("b")[0].parts[3].digest == "digest of page 2:7"


def test_a_keeper_ends_a_while_after_its_last_trainer():
    alive: set[int] = set()
    watch = Watch(linger_s=100, now=0)

    def over(now: float) -> bool:
        return watch.over(now, lambda pid, created: pid in alive)

    assert not over(99)
    watch.enter(7, 0.0)
    alive.add(7)
    assert not over(5000), "a trainer is alive"
    alive.clear()
    assert not over(5099)
    watch.enter(8, 0.0)
    alive.add(8)
    assert not over(9000), "another one came in time"
    alive.clear()
    assert over(9100)


def test_a_keeper_to_which_nobody_comes_ends_too():
    assert Watch(linger_s=100, now=50).over(150, lambda pid, created: True)

"""What members make of a new gathering: who may stay, who holds the truth, who is brought up to date. Pure functions.

Each member says a `Word`. From all words, the same on everybody, follows a `Ruling`:

    refused   means something else than the rest (version, method, model, run): it leaves, and the others meet again
    true      of those that have taken part in the run, the ones of the newest epoch
    ended     the rounds of each fragment that the true ones have ended, at the most
    certain   in doubt about a round that another one has ended: it holds the same result (their digests say so), and
              ends it the same way
    behind    newcomers, and whoever can end the same rounds in no such way: they are given the state. Where there is
              no common model (gossip) a round that failed for some is not asked after: newcomers alone are behind

A round ends on a member when it has heard the verdict of all (thinwire.collectives), and it is in doubt from the moment
it has told its own. Whoever ended it has therefore heard from everybody that was in it, so each survivor has either
ended it too or is in doubt and can; if no survivor has ended it, nobody has whose word still counts, and all forget it.
That is the two-phase commit, with the survivors asked about the outcome instead of a coordinator.

An epoch is counted with every settled gathering. A minority that was cut off after it had ended a round does not win
by its higher count of rounds: the others have settled since. Then digests of the state are told, and the majority of
the true ones is right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class FragmentWord:
    """Where a member is with a fragment.

    ended    rounds that it has ended, committed or skipped
    present  ranks that were in the last one, in the numbers of the gathering that it was in
    last     digest of the last one
    doubt    digest of what it holds of the next one, whose verdict did not come through; empty: nothing
    """

    ended: int = 0
    present: tuple[int, ...] = ()
    last: str = ""
    doubt: str = ""


@dataclass(frozen=True)
class Word:
    """What a member says when it has come to a gathering.

    facts      what all must mean alike: name -> value
    epoch      of the last settled gathering that it was in; 0: none
    step       shared steps behind it
    fragments  where it is with each
    redo       rounds that it was about to do at this step: fragment -> number
    model_step  the step that the common model is of, where it changes with every step of an optimizer; else 0
    common     whether there is a common model
    founds     whether it may begin a run, with others who may
    """

    facts: Mapping[str, str]
    epoch: int = 0
    step: int = 0
    fragments: tuple[FragmentWord, ...] = ()
    redo: Mapping[int, int] = field(default_factory=dict)
    model_step: int = 0
    common: bool = True
    founds: bool = True


@dataclass(frozen=True)
class Ruling:
    """See the module; ranks are of the new gathering.

    refused  rank -> why
    certain  rank -> fragments whose round in doubt it is to end
    present  fragment -> ranks that were in that round, for those who are certain of it now
    behind   ranks
    ended    rounds of each fragment that are behind all
    step     where all go on
    redo     fragments whose rounds all begin again at once
    strays   nobody is in a run, and nobody may begin one
    """

    epoch: int
    ended: tuple[int, ...]
    step: int
    refused: Mapping[int, str]
    behind: frozenset[int]
    certain: Mapping[int, tuple[int, ...]]
    present: Mapping[int, tuple[int, ...]]
    redo: tuple[int, ...]
    strays: bool


def judge(words: Mapping[int, Word]) -> Ruling:
    """The ruling that follows from all members' words, by rank."""
    newest = max(word.epoch for word in words.values())
    true = {rank for rank, word in words.items() if word.epoch == newest}
    if newest == 0:  # the beginning: whoever comes from a later checkpoint knows more
        true = {rank for rank in true if words[rank].founds} or true
        furthest = max(_standing(words[rank]) for rank in true)
        true = {rank for rank in true if _standing(words[rank]) == furthest}
    refused = _refused(words, true)
    true -= refused.keys()
    count = max(len(words[rank].fragments) for rank in true)
    ended = [max(_at(words[rank], f).ended for rank in true) for f in range(count)]
    by_whom = {
        f: next(_at(words[r], f) for r in sorted(true) if _at(words[r], f).ended == ended[f]) for f in range(count)
    }
    model_step = max(words[rank].model_step for rank in true)
    behind, certain = set[int](), dict[int, tuple[int, ...]]()
    for rank, word in words.items():
        level = [_level(_at(word, f), by_whom[f]) if word.common else False for f in range(count)]
        new = rank not in true and not word.epoch
        if rank in refused:
            continue
        if new or len(word.fragments) != count or None in level or word.model_step < model_step:
            behind.add(rank)
        elif True in level:
            certain[rank] = tuple(f for f, doubted in enumerate(level) if doubted)
    step = max(words[rank].step for rank in true)
    redo = {
        f for rank in true if words[rank].step == step for f, number in words[rank].redo.items() if number == ended[f]
    }
    present = {f: word.present for f, word in by_whom.items()}
    epoch = max(word.epoch for word in words.values()) + 1
    strays = not newest and not any(word.founds for word in words.values())
    return Ruling(epoch, tuple(ended), step, refused, frozenset(behind), certain, present, tuple(sorted(redo)), strays)


def majority(digests: Mapping[int, str]) -> str | None:
    """What most hold; None if no side is larger than every other."""
    (most, count), *rest = Counter(digests.values()).most_common()
    return most if not rest or rest[0][1] < count else None


def _standing(word: Word) -> tuple[int, int]:
    return word.step, sum(fragment.ended for fragment in word.fragments)


def _at(word: Word, fragment: int) -> FragmentWord:
    return word.fragments[fragment] if fragment < len(word.fragments) else FragmentWord(ended=-1)


def _level(own: FragmentWord, best: FragmentWord) -> bool | None:
    """Whether a member has a round in doubt that it can end as `best` did; False: it is there; None: it is behind."""
    if own.ended == best.ended:
        return False
    if own.ended == best.ended - 1 and own.doubt and own.doubt == best.last:
        return True
    return None


def _refused(words: Mapping[int, Word], true: set[int]) -> dict[int, str]:
    """Who means something else than most of the true ones (of several as many: than the one of the lowest rank)."""
    refused: dict[int, str] = {}
    for name in sorted({name for word in words.values() for name in word.facts}):
        held = {rank: word.facts.get(name, "nothing") for rank, word in words.items() if rank not in refused}
        right = Counter(held[rank] for rank in sorted(true - refused.keys())).most_common(1)[0][0]
        refused |= {rank: f"{name}: {found}; the run has {right}" for rank, found in held.items() if found != right}
    return refused

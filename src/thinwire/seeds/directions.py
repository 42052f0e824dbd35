"""What is done with directions: to perturb along them, to replay updates, to project on them and to combine them.

    perturbed   w + eps z(seed)                            in float32, rounded to the tensor's dtype
    apply       w <- keep w - sum_i c_i z(seed_i)          for each update in turn
    project     <x, z(seed_i)>                             float64, for each seed
    combined    sum_i c_i z(seed_i)

No direction is ever stored: a tensor is gone through once, and all that an operation does to a block of it is done
while the block is in the cache. The arithmetic and its order are a contract (docs/perturbations.md), so that members,
machines and versions of this library come to the same bits: scalars in groups of eight,
u = ((c1 z1 + c2 z2) + ...) + c8 z8, then w <- w - u, all float32. Scalars that are zero and seeds that leave a tensor
alone are left out before groups are made. In half precision an update is worked out in float32 and rounded once.

Error   replay: none, it is the definition. perturbed: half a step of the dtype. project: that of float32 sums over a
        block, which are added in float64; the same on one machine only
State   none
Cost    less than 10 MiB of working memory a thread, whatever the tensors' sizes; 1.1 to 1.3 copies a direction
        in replays of float32, 2.4 to perturb (benchmarks/results/seeds_speed.md)
Source  Malladi et al. 2023, arXiv:2305.17333 (MeZO: a direction is its seed)
Differs MeZO walks the weights to w + eps z, to w - eps z and back, and rounding leaves them elsewhere. Here only
        updates write to weights. A tensor that is not contiguous is copied once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from thinwire.codecs.memory import Scratch, empty
from thinwire.errors import ConfigError
from thinwire.seeds.noise import Noise, Rademacher
from thinwire.seeds.philox import BATCH, draw, on_host, tensor_id
from thinwire.seeds.replay import DRAWN, Job, cut, exact, projected, replay
from thinwire.seeds.rounding import ROUNDINGS, Rounding
from thinwire.seeds.spans import Bundle, each
from thinwire.seeds.updates import Update

#: Tensors by their parameters' qualified names.
Named = Sequence[tuple[str, Tensor]]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_PLAIN = Rademacher()


def perturbed(w: Tensor, seed: int, name: str, eps: float, noise: Noise = _PLAIN, out: Tensor | None = None) -> Tensor:
    """w + eps z(seed), of w's shape; `w` is not written to. `perturbed_all` of one tensor."""
    return perturbed_all([(name, w)], seed, eps, noise, None if out is None else [out])[0]


@torch.inference_mode(mode=False)  # memory that is kept may not be of a caller's inference mode
def perturbed_all(
    pairs: Named, seed: int, eps: float, noise: Noise = _PLAIN, out: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """w + eps z(seed) of several tensors: many small ones for little more than the price of one.

    eps      exactly representable in float32
    out      tensors to write to, of the same shapes; the sums are rounded to their dtypes
    returns  `out`; without it new tensors, and where the seed leaves a tensor alone, that tensor itself
    raises   ConfigError for other dtypes than float32, float16 and bfloat16, and for what `out` cannot take
    """
    _check_tensors(pairs)
    reached = noise.reaches([seed], [name for name, _ in pairs])
    alone = [out is None and reached is not None and not reached[0, index] for index in range(len(pairs))]
    if out is None:
        out = [w.detach() if left else _like(w) for (_, w), left in zip(pairs, alone, strict=True)]
    _check_out(pairs, out)
    triples = [(name, w, target) for (name, w), target in zip(pairs, out, strict=True)]
    changed = [triple for triple, left in zip(triples, alone, strict=True) if not left]
    _walk(changed, [Update((seed,), (-exact([eps])[0],))], noise, "nearest", 0)
    return list(out)


@torch.inference_mode(mode=False)
@torch.no_grad()
def perturbed_rows(w: Tensor, rows: Tensor, seed: int, name: str, eps: float, noise: Noise = _PLAIN) -> Tensor:
    """perturbed(w, ...)[rows], without the work for other rows.

    rows     int64 [m], from 0 to len(w) - 1: of an embedding, the tokens of a batch
    returns  [m, ...]
    """
    _check_tensors([(name, w)])
    kept = w.detach().index_select(0, rows)  # refuses rows below 0, as embeddings do
    reached = noise.reaches([seed], [name])
    if not kept.numel() or (reached is not None and not reached[0, 0]):
        return kept
    width, per, times = kept[0].numel(), noise.per_block, noise.times(exact([eps])[0])
    covered = -(-width // per) + 1  # blocks that a row can touch, wherever in a block it begins
    flat, together = kept.view(len(rows), width), max(1, BATCH // covered)
    for begin in range(0, len(rows), together):
        values, numbers = flat[begin : begin + together], rows[begin : begin + together]
        first = numbers.long().unsqueeze(1) * width  # [r, 1]
        block = first // per + torch.arange(covered, device=w.device)  # [r, covered]
        words, z = (
            draw([seed], tensor_id(name), block.reshape(-1))[0],
            torch.empty(block.numel() * per, device=w.device),
        )
        times(*((words.numpy(), z.numpy()) if on_host(w.device) else (words, z)))
        place = first % per + torch.arange(width, device=w.device)  # [r, width]
        values.copy_(values.float().add_(z.view(len(block), -1).gather(1, place)))
    return kept


def apply_(
    w: Tensor, name: str, updates: Sequence[Update], noise: Noise = _PLAIN, rounding: Rounding = "stochastic",
    key: int = 0,
) -> None:  # fmt: skip
    """Replay updates on a tensor, in place. `apply_all_` of one tensor."""
    apply_all_([(name, w)], updates, noise, rounding, key)


def apply_all_(
    pairs: Named, updates: Sequence[Update], noise: Noise = _PLAIN, rounding: Rounding = "stochastic", key: int = 0
) -> None:
    """Replay updates in order, in place: memory is gone through once, whatever the number of updates and scalars.

    rounding  of half precision: "stochastic" or "nearest"
    key       64 bits that stochastic rounding follows from, the same on all members
    raises    ConfigError for other dtypes than float32, float16 and bfloat16, and for scalars that are not finite
              float32 numbers
    """
    if rounding not in ROUNDINGS:
        raise ConfigError(f"rounding={rounding!r}", expected=" or ".join(ROUNDINGS), mend="rounding='stochastic'")
    _check_tensors(pairs)
    _walk([(name, w, w) for name, w in pairs], updates, noise, rounding, key)


@torch.inference_mode(mode=False)
@torch.no_grad()
def project(x: Tensor, name: str, seeds: Sequence[int], noise: Noise = _PLAIN) -> Tensor:
    """<x, z(seed)> for each seed.  float64 [len(seeds)], on x's device"""
    _check_tensors([(name, x)])
    reached = noise.reaches(seeds, [name])
    alive = [index for index in range(len(seeds)) if reached is None or reached[index, 0]]
    flat = _flat(x)

    def work(bundle: Bundle, scratch: Scratch) -> Tensor:
        counters, sums = bundle.counters(noise.per_block, scratch), torch.zeros(len(alive), dtype=torch.float64)
        for begin in range(0, len(alive), DRAWN):
            some = [seeds[index] for index in alive[begin : begin + DRAWN]]
            words = draw(some, *counters, scratch=scratch)
            for span, first in bundle.placed:
                values, _ = span.open(scratch)
                sums[begin : begin + len(some)] += projected(values, words, first, noise, scratch)
        return sums

    found = torch.zeros(len(seeds), dtype=torch.float64)
    for sums in each(cut([(flat, flat, tensor_id(name))], noise, len(alive)), work):
        found[alive] += sums  # in order
    return found.to(x.device)


def combined(
    like: int | Tensor, name: str, seeds: Sequence[int], scalars: Sequence[float], noise: Noise = _PLAIN
) -> Tensor:
    """sum_i scalars[i] z(seeds[i]), in the groups of `apply_`: groups are added up in order.

    like     a tensor of the shape and device that are wanted, or a number of elements
    scalars  exactly representable in float32
    returns  float32
    """
    total = torch.zeros(like) if isinstance(like, int) else torch.zeros(like.shape, device=like.device)
    apply_(total, name, [Update(tuple(seeds), tuple(-c for c in scalars))], noise)
    return total


@torch.inference_mode(mode=False)  # which turns gradients on
@torch.no_grad()
def _walk(
    triples: Sequence[tuple[str, Tensor, Tensor]], updates: Sequence[Update], noise: Noise, rounding: Rounding, key: int
) -> None:
    """Replay on tensors of any layout: (name, source, target)."""
    reached = noise.reaches([seed for update in updates for seed in update.seeds], [name for name, _, _ in triples])
    jobs = []
    for index, (name, source, target) in enumerate(triples):
        written = _flat(target)
        read = written if source is target else _flat(source)
        jobs.append(Job(name, read, written, source.ndim >= 2, None if reached is None else reached[:, index]))
    replay(jobs, updates, noise, rounding, key)
    for job, (_, _, target) in zip(jobs, triples, strict=True):
        if not target.is_contiguous():
            target.copy_(job.target.view(target.shape))


def _flat(w: Tensor) -> Tensor:
    """[n], row by row: a view of a contiguous tensor, of others a copy."""
    return w.detach().contiguous().view(-1)


def _like(w: Tensor) -> Tensor:
    return empty(w.numel(), w.dtype, w.device).view(w.shape)


def _check_tensors(pairs: Named) -> None:
    for name, w in pairs:
        if w.dtype not in _DTYPES:
            raise ConfigError(
                f"parameter {name!r} is {w.dtype}",
                expected="float32, float16 or bfloat16: a step is worked out in float32",
                mend="model.float() before it is tuned, or leave this parameter out",
            )


def _check_out(pairs: Named, out: Sequence[Tensor]) -> None:
    if len(out) != len(pairs):
        raise ConfigError(f"{len(out)} tensors to write {len(pairs)} to", expected="one each", mend="as many in `out`")
    for (name, w), target in zip(pairs, out, strict=True):
        if target.shape != w.shape or target.device != w.device:
            raise ConfigError(
                f"{name!r}, {[*w.shape]} on {w.device}, is to be written to {[*target.shape]} on {target.device}",
                expected="a tensor of its shape, where it is itself",
                mend=f"out=torch.empty_like({name})",
            )
    _check_tensors([(name, target) for (name, _), target in zip(pairs, out, strict=True)])

"""Models larger than a device's memory, tuned stage by stage: weights come to the device, and go again.

    for each stage:   bring its weights    w <- w - c z(seed) of the step before    both sides' hidden states through it

A step's update follows from its losses, which are known when the last stage is done. It waits, and is applied to a
stage when that is brought for the next step: weights travel once a step each way, not twice. While a stage computes,
the next one is brought. A direction is drawn from its seed and a parameter's name, so nothing is remembered for what
waits.

Error   none: waiting updates are those of any other tuner, to the bit, and `forward` applies them before it reads.
State   updates that wait, by stage; closed rounds
Cost    a step moves each weight to the device once, and back once if anything was to be applied. At most two stages'
        weights are on the device, one's perturbed copy, and a hidden state for every probe.
Source  Wang et al. 2025, arXiv:2503.12668 (ZO2) and arXiv:2507.03211 (DistZO2); sides.py tells what members do together
Differs generators' states need not be kept, and weights are never walked to w + eps z and back: a copy is perturbed, so
        that half precision does not drift. Slices of a stage on several devices are left to FSDP's kind of tool.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from thinwire.errors import ConfigError
from thinwire.seeds import noise as noises
from thinwire.seeds.digests import Digest, Spec, spec
from thinwire.seeds.directions import apply_all_, perturbed_all
from thinwire.seeds.recipe import Recipe
from thinwire.seeds.shelves import Shelf
from thinwire.seeds.updates import Update

#: A side of a direction: its seed, and how far to go along it.
Probe = tuple[int, float]


class Offloaded:
    """A model as a sequence of stages whose weights are on a shelf.

    stages  name -> module that is called with what the one before returned. Their parameters need no memory (the meta
            device does); which are tuned says requires_grad. Full names are "stage.parameter"
    shelf   tensors by full name: all parameters, and buffers that are part of a state
    recipe  says noise and rounding; eps and seeds come with the probes
    device  where stages compute
    raises  ConfigError for a tensor that is not on the shelf, is of another shape, or belongs to two stages
    """

    def __init__(
        self, stages: Mapping[str, nn.Module], shelf: Shelf, recipe: Recipe, *, device: torch.device | str = "cpu"
    ) -> None:
        self._modules, self._shelf, self._recipe = list(stages.values()), shelf, recipe
        self._noise, self._device = noises.parse(recipe.noise), torch.device(device)
        self._held = [_Held(name, module) for name, module in stages.items()]
        self._due: list[list[Update]] = [[] for _ in self._held]
        _check(self._held, self._modules, shelf)
        self.brought = 0

    # --- passes ------------------------------------------------------------------------------------------------------

    def forward(self, inputs: Any) -> Any:
        """What the model makes of its inputs, with all updates applied; without gradients."""
        return self._run(inputs, [None])[0]

    def probe(self, inputs: Any, probes: Sequence[Probe]) -> list[Any]:
        """What the model makes of its inputs at w + eps z(seed), for each (seed, eps), eps exact in float32.

        Random draws of a stage (dropout) are the same for all of them.
        """
        return self._run(inputs, list(probes))

    def apply(self, update: Update) -> None:
        """Move the weights; each stage's when it is next brought."""
        for waiting in self._due:
            waiting.append(update)

    def flush(self) -> None:
        """Apply what waits, so that the shelf holds the model; before a checkpoint."""
        for index, waiting in enumerate(self._due):
            if waiting:
                self._bring(index)

    def _run(self, inputs: Any, probes: Sequence[Probe | None]) -> list[Any]:
        hidden = [inputs] * len(probes)
        with torch.no_grad(), self._ahead() as bring:
            coming = bring(0)
            for index, held in enumerate(self._held):
                tensors = coming.result()
                if index + 1 < len(self._held):
                    coming = bring(index + 1)
                else:
                    del coming  # holds the tensors
                hidden = self._through(index, held, tensors, hidden, probes)
                del tensors
        return hidden

    def _through(
        self, index: int, held: _Held, tensors: dict[str, Tensor], hidden: list[Any], probes: Sequence[Probe | None]
    ) -> list[Any]:
        """Every probe's hidden state through one stage; its weights are perturbed into one copy, over and over."""
        pairs, copies, results = held.tuned(tensors), None, []
        before = {name: tensor._version for name, tensor in tensors.items()}
        for number, (state, probe) in enumerate(zip(hidden, probes, strict=True)):
            values = dict(tensors)
            if probe is not None:
                if copies is None:
                    copies = [torch.empty_like(w) for _, w in pairs]
                perturbed_all(pairs, *probe, self._noise, out=copies)
                values.update(zip((name for name, _ in pairs), copies, strict=True))
            with _draws(self._device, again=number + 1 < len(probes)):
                results.append(functional_call(self._modules[index], held.local(values), (state,)))
        written = [name for name, tensor in tensors.items() if tensor._version != before[name]]
        if written:
            raise ConfigError(
                f"{written[0]!r} changes as its stage computes",
                expected="stages that leave weights and buffers as they were",
                mend="stage.eval(), or eval() for the layers with running statistics",
            )
        return results

    # --- weights -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _ahead(self) -> Iterator[Callable[[int], Future[dict[str, Tensor]]]]:
        """`_bring` beside the caller, one stage after the other; on a GPU in a stream of its own."""
        cuda = self._device.type == "cuda"
        stream = torch.cuda.Stream(self._device) if cuda else None  # type: ignore[no-untyped-call]
        compute = torch.cuda.current_stream(self._device) if cuda else None

        def work(index: int) -> dict[str, Tensor]:
            if stream is None or compute is None:
                return self._bring(index)
            with torch.cuda.stream(stream):
                tensors = self._bring(index)
            stream.synchronize()
            for tensor in tensors.values():
                tensor.record_stream(compute)  # its memory is not to be given away before compute is done with it
            return tensors

        with ThreadPoolExecutor(1, "thinwire-offload") as worker:
            yield lambda index: worker.submit(work, index)

    def _bring(self, index: int) -> dict[str, Tensor]:
        """A stage's tensors on the device, with what waited for them applied, there and on the shelf."""
        held, waiting = self._held[index], self._due[index]
        tensors = {name: self._shelf.get(name).to(self._device, non_blocking=True) for name in held.names}
        self.brought += 1
        if waiting:
            recipe = self._recipe
            apply_all_(held.tuned(tensors), waiting, self._noise, rounding=recipe.rounding, key=recipe.seed)
            for name, tensor in held.tuned(tensors):
                self._shelf.put(name, tensor)
            waiting.clear()
        return tensors

    # --- asking ------------------------------------------------------------------------------------------------------

    @property
    def specs(self) -> dict[str, Spec]:
        """Dtype and shape of every tuned tensor, by full name."""
        return {name: spec(tensor) for held in self._held for name, tensor in held.parameters.items()}

    @property
    def frozen(self) -> dict[str, Spec]:
        """The same of what is not tuned."""
        return {
            name: spec(self._shelf.get(name)) for held in self._held for name in held.names if name not in self.specs
        }

    def digest(self, names: Sequence[str] | None = None) -> str:
        """Digest of the tuned tensors, or of those named, one after the other; flushes first."""
        self.flush()
        state = Digest()
        for name in sorted(self.specs if names is None else names, key=str.encode):
            state.add(name, self._shelf.get(name))
        return state.hex()


class _Held:
    """What a stage needs from the shelf."""

    def __init__(self, stage: str, module: nn.Module) -> None:
        self._prefix = f"{stage}."
        state = module.state_dict(keep_vars=True)
        owned = dict(module.named_parameters())  # tied ones once, under their first name
        others = {name: tensor for name, tensor in state.items() if not isinstance(tensor, nn.Parameter)}
        self.shapes = {self._prefix + name: tensor.shape for name, tensor in {**owned, **others}.items()}
        self.names = tuple(self.shapes)
        self.parameters = {self._prefix + name: p for name, p in owned.items() if p.requires_grad}

    def tuned(self, tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
        return [(name, tensors[name]) for name in self.parameters]

    def local(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By the names that the module has for them."""
        return {name.removeprefix(self._prefix): tensor for name, tensor in tensors.items()}


@contextmanager
def _draws(device: torch.device, *, again: bool) -> Iterator[None]:
    """Whatever is drawn within the block is drawn again after it, if `again`."""
    if not again:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def _check(held: Sequence[_Held], modules: Sequence[nn.Module], shelf: Shelf) -> None:
    owners: dict[int, str] = {}
    there = set(shelf.names)
    for number, (stage, module) in enumerate(zip(held, modules, strict=True)):
        for name, shape in stage.shapes.items():
            if name not in there or shelf.get(name).shape != shape:
                found = f"of {tuple(shelf.get(name).shape)}" if name in there else "not there"
                raise ConfigError(
                    f"{name!r} is {found} on the shelf",
                    expected=f"a tensor of {tuple(shape)}: every parameter and buffer of the stages, by its full name",
                    mend="name stages as the whole model does, or save model.state_dict() anew",
                )
        for p in module.parameters():
            other = owners.setdefault(id(p), f"{number}")
            if other != f"{number}":
                raise ConfigError(
                    f"stages {other} and {number} share a parameter",
                    expected="stages that can be moved one after the other",
                    mend="put what shares weights into one stage, or untie it",
                )
    if not any(stage.parameters for stage in held):
        raise ConfigError("no stage has a trainable parameter", expected="one with requires_grad", mend="unfreeze some")

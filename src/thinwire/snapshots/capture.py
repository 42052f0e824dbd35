"""Snapshots beside training: the state of one step, copied while the next forward and backward passes run.

    optimizer.register_step_pre_hook(lambda *_: capture.settle())     # parameters change now
    for step in range(steps):
        if step % 10 == 0:
            capture.begin({"model": model.state_dict(), ...}, version=step)
        loss(model, batch).backward()
        optimizer.step()

Between two optimizer steps parameters and moments stand still, and that is what makes a copy beside the passes a state
of one step. `settle` waits for what is left of the copy: that is all of the stall, but for what changes during a
forward pass (running statistics), which is copied at once. Hashing, and taking the older one's place, come after.

Differs  REFT (arXiv:2310.12670) copies in buckets between the passes' communication; here one thread copies beside
         them, and who trains says when parameters change.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from thinwire.errors import ConfigError, LinkError, ThinwireError
from thinwire.links.crew import Crew
from thinwire.snapshots.image import Image, image_of
from thinwire.snapshots.memory import Attached
from thinwire.snapshots.store import Store

_log = logging.getLogger("thinwire")


class Capture:
    """One member's snapshots, one at a time, into a store. For one thread, that trains."""

    def __init__(self, store: Store, owner: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self._store, self._owner, self._clock = store, owner, clock
        self._crew = Crew()
        self._copied, self._ended = threading.Event(), threading.Event()
        self._copied.set()
        self._ended.set()
        self._failed: ThinwireError | None = None
        self.stall_s = 0.0  # in begin and settle, since the beginning

    def begin(self, state: Mapping[str, Any], version: int) -> bool:
        """Begin to copy a state; tensors must not change until `settle` returned.

        state    nested; under "moving", if there is any, what a forward pass changes: it is copied before this returns
        returns  whether it was begun: not while the snapshot before this one is still on its way
        """
        if not self._ended.is_set():
            return False
        began = self._clock()
        image = image_of({**state, "moving": _cloned(state["moving"])} if "moving" in state else state)
        before = _versions(image)
        self._copied.clear()
        self._ended.clear()
        self._crew.do(lambda: self._take(image, version, before))
        self.stall_s += self._clock() - began
        return True

    def settle(self) -> None:
        """Wait until the state is copied: tensors may change then. Nothing to wait for is no time."""
        if self._copied.is_set():
            return
        began = self._clock()
        self._copied.wait()
        self.stall_s += self._clock() - began

    def finish(self) -> None:
        """Wait until the snapshot is in force. Raises what it failed of, once: ConfigError, or LinkError."""
        self._ended.wait()
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed

    def close(self) -> None:
        """Wait for what is under way, and let the thread end."""
        self._ended.wait()
        self._crew.close()

    def _take(self, image: Image, version: int, before: Mapping[str, int]) -> None:
        try:
            name = self._store.begin(self._owner, version, {0: image.size})[0]
            with Attached(name, image.size) as memory:
                for _ in image.write(memory):
                    pass
                del memory
            changed = [name for name, count in _versions(image).items() if count != before[name]]
            self._copied.set()
            if changed:
                raise _torn(version, changed)
            self._store.arrived(self._owner, version, 0)
            self._store.promote(self._owner, version)
        except (ConfigError, LinkError) as error:  # training goes on without this one, and says so
            _log.warning("no snapshot: %s", error)
            self._failed = error
        finally:
            self._copied.set()
            self._ended.set()


def _versions(image: Image) -> dict[str, int]:
    """How often each tensor was changed in place, as autograd counts."""
    return {name: tensor._version for name, tensor in image.tensors.items()}


def _cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _cloned(item) for key, item in value.items()}
    return [_cloned(item) for item in value] if isinstance(value, list | tuple) else value


def _torn(version: int, changed: list[str]) -> ConfigError:
    return ConfigError(
        f"{changed[0]} and {len(changed) - 1} others changed while snapshot {version} was copied; it is dropped",
        expected="tensors that stand still until settle() returned",
        mend="call settle() in a step's pre-hook; put what a forward pass changes under 'moving'",
    )

"""torchft's Manager as it is used here: it asks for a quorum and has our process group configured, and no more."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torchft.checkpointing import CheckpointTransport
from torchft.manager import MANAGER_ADDR_KEY, REPLICA_ID_KEY, Manager
from torchft.process_group import ProcessGroup

from thinwire.elastic.rendezvous import NotFormed

Names = tuple[str, ...]


class Asker:
    """One member's Manager at one lighthouse.

    names    of the last quorum, by rank
    failure  why no group came of it, or None
    busy     the quorum is there, and the group is being formed
    """

    def __init__(
        self, heart: str, name: str, host: str, store: TCPStore, limit_s: float, connect_s: float,
        holds: Callable[[int, Names], bool], form: Callable[[str, int, int, Names], None],
    ) -> None:  # fmt: skip
        """
        heart  address of this member's ManagerServer
        store  of this member, at `host`: the rendezvous of a quorum takes place at one of its members'
        holds  (number, names) -> whether the gathering of that number is held here, of these
        form   (store's address and prefix, rank, number, names): forms the group; raises NotFormed
        """
        logging.getLogger("torchft.manager").setLevel(logging.CRITICAL)  # what fails here is told in our words
        store.set(MANAGER_ADDR_KEY, heart)
        store.set(REPLICA_ID_KEY, name)
        self.names: Names = ()
        self.failure: NotFormed | None = None
        self.busy = False
        self._holds, self._form, self._held = holds, form, False
        limit = timedelta(seconds=limit_s)
        # Rank 1 of our replica group: rank 0 would start a server within this process, and beat there.
        self._manager = Manager(
            pg=_Configured(self._configure), load_state_dict=None, state_dict=None, min_replica_size=1,
            use_async_quorum=False, rank=1, world_size=1, store_addr=host, store_port=store.port, replica_id=name,
            hostname="127.0.0.1", init_sync=False, timeout=limit, quorum_timeout=limit,
            connect_timeout=timedelta(seconds=connect_s), checkpoint_transport=NoHealing(),
        )  # fmt: skip
        # Names and largest step are in the client's answer alone: nothing public of Manager has them.
        self._client = self._manager._client
        self._manager._client = self

    def ask(self, step: int, limit_s: float) -> None:
        """One quorum, and the group it leads to, if that is a new one; see `failure`.

        raises  RuntimeError or TimeoutError if nobody answers
        """
        self.failure, self._held = None, False
        self._manager.load_state_dict({"step": step, "batches_committed": 0})
        self._manager.start_quorum(allow_heal=False, timeout=timedelta(seconds=limit_s))
        if self.failure is None and (errored := self._manager.errored()) is not None:
            raise errored.original_exception

    def close(self) -> None:
        self._manager.shutdown(wait=False)

    def _quorum(self, **asked: Any) -> Quorum:
        """What Manager calls on its client: the quorum with our number for its id, so that it configures by that."""
        found = self._client._quorum(**asked)
        self.names = tuple(found.replica_ids)
        self._held = self._holds(found.max_step, self.names)
        return Quorum(
            found.max_step + (not self._held), found.replica_rank, found.replica_world_size, found.store_address,
            found.replica_ids,
        )  # fmt: skip

    def _configure(self, store: str, rank: int, number: int) -> None:
        if self._held:  # a new Manager knows no id yet, and has us configure what holds
            return
        self.busy = True
        try:
            self._form(store, rank, number, self.names)
        except NotFormed as failure:
            self.failure = failure
        finally:
            self.busy = False


@dataclass(frozen=True)
class Quorum:
    """A quorum as Manager reads it: whom to heal from is left out."""

    quorum_id: int
    replica_rank: int
    replica_world_size: int
    store_address: str
    replica_ids: list[str]
    recover_src_manager_address: str = ""
    recover_src_replica_rank: int | None = None
    recover_dst_replica_ranks: tuple[int, ...] = ()
    max_step: int = 0
    max_replica_rank: int | None = None
    max_world_size: int = 0
    heal: bool = False


class _Configured(ProcessGroup):  # type: ignore[misc]
    """A process group for Manager that hands on what it is configured with: (store, rank, number of the gathering)."""

    def __init__(self, configure: Callable[[str, int, int], None]) -> None:
        super().__init__(0, 1)
        self._hand_on = configure

    def configure(self, store_addr: str, replica_id: str, rank: int, world_size: int, quorum_id: int | None = None,
                  group_rank: int | None = None, group_world_size: int | None = None,
                  global_ranks: list[int] | None = None) -> None:  # fmt: skip
        assert quorum_id is not None
        self._hand_on(store_addr, rank, quorum_id)


class NoHealing(CheckpointTransport[Any]):  # type: ignore[misc]
    """torchft's transports unpickle what a peer sends. State is handed over elsewhere, as tensors and numbers."""

    def metadata(self) -> str:
        return ""

    def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: Any, timeout: timedelta) -> None:
        raise AssertionError("torchft was to send a state")

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> Any:
        raise AssertionError("torchft was to take a state")

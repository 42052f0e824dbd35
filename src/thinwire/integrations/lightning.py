"""Lightning's Trainer.

    with thinwire.integrations.join() as link:
        trainer = Trainer(devices=1, default_root_dir=f"runs/member-{link.rank}",
                          callbacks=[Synchronized(diloco(every=100), link)])
        trainer.fit(module, part)

Accumulation, clipping, schedulers, precision and manual optimisation are Lightning's own. Validation sees the model
that all members agree on, and so does whoever asks after training. What the method remembers is in Lightning's
checkpoints: fit(ckpt_path=...) resumes to the bit where Lightning does.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch.optim import Optimizer

from thinwire.errors import ConfigError
from thinwire.integrations.apart import check_apart, check_folders, check_length, missing, samples_in, sends_gradients
from thinwire.links.base import Link
from thinwire.method import Method, Phases
from thinwire.rounds import Outcome
from thinwire.synchronizer import Synchronizer, synchronize

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.plugins import MixedPrecision
    from lightning.pytorch.trainer.states import TrainerFn
except ImportError as error:
    raise missing(__name__, "lightning", error) from error


class Synchronized(Callback):
    """Trains with the other members'; one process a member, one optimizer a module.

    sync    the Synchronizer of the last fit, None before the first
    raises  ConfigError when training begins, for what cannot be and for what thinwire.synchronize refuses
    """

    def __init__(
        self,
        method: Method | Phases,
        link: Link,
        *,
        seed: int = 0,
        observer: Callable[[Outcome], None] | None = None,
    ) -> None:
        self.sync: Synchronizer | None = None
        self._method, self._link, self._seed, self._observer = method, link, seed, observer
        self._saved: dict[str, Any] = {}
        self._training, self._evaluating = ExitStack(), ExitStack()

    # --- training ------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer)
        optimizer, precision = trainer.optimizers[0], trainer.precision_plugin
        if sends_gradients(self._method):
            self._training.callback(optimizer.register_step_pre_hook(_closure_first).remove)
        self.sync = synchronize(
            pl_module, optimizer, self._method, self._link, seed=self._seed, observer=self._observer,
            scaler=precision.scaler if isinstance(precision, MixedPrecision) else None,
        )  # fmt: skip
        if self._saved:
            self.sync.load_state_dict(self._saved)
            self._saved = {}
        self._training.enter_context(self.sync)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert self.sync is not None
        self.sync.count(samples_in(batch))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        assert self.sync is not None
        self.sync.combine_gradients()  # Lightning clips after this

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.sync is not None
        stack, self._training = self._training, ExitStack()
        stack.close()  # waits for the rounds under way
        self.sync.take_consensus()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._evaluating.close()
        stack, self._training = self._training, ExitStack()
        stack.__exit__(type(exception), exception, exception.__traceback__)

    def _check(self, trainer: Trainer) -> None:
        check_apart(trainer.world_size, "Lightning's Trainer")
        if len(trainer.optimizers) != 1:
            raise ConfigError(
                f"a module with {len(trainer.optimizers)} optimizers",
                expected="one, whose steps are what members count",
                mend="put the parameters into groups of one optimizer, or write the loop with Fabric",
            )
        check_length(self._link, trainer.estimated_stepping_batches)
        for saving in trainer.checkpoint_callbacks:
            if isinstance(saving, ModelCheckpoint):
                check_folders(self._link, saving.dirpath or trainer.default_root_dir)

    # --- evaluation ----------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.sync is not None and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._evaluating.enter_context(self.sync.evaluating())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluating.close()

    # --- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {} if self.sync is None else self.sync.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict


def _closure_first(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Run the closure before the step rather than in it: gradients must be there when members combine them.

    An optimizer that wants its closure several times (LBFGS) gets none, and says so.
    """
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is not None:
        closure()
    return args[:1], {name: value for name, value in kwargs.items() if name != "closure"}

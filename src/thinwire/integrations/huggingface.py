"""The Hugging Face Trainer.

    with thinwire.integrations.join() as link:
        trainer = Trainer(model, TrainingArguments(f"runs/member-{link.rank}", ...), train_dataset=part)
        with synchronize(trainer, diloco(every=100), link):
            trainer.train()
        trainer.save_model()

A callback, there for the length of the block. Accumulation, clipping, schedulers and mixed precision are the Trainer's
own; evaluation during training sees the model that all members agree on, and so does whoever asks after it. Beside
each of the Trainer's checkpoints lies what the method remembers: train(resume_from_checkpoint=...) resumes to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from thinwire.errors import ConfigError
from thinwire.fragments import digest
from thinwire.integrations.accelerate import combining_before_clipping, synchronizer_of
from thinwire.integrations.apart import check_apart, check_folders, check_length, missing, samples_in
from thinwire.links.base import Link
from thinwire.method import Method, Phases
from thinwire.rounds import Outcome
from thinwire.synchronizer import Synchronizer

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise missing(__name__, "hf", error) from error

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

STATE = "thinwire.pt"  # in each of the Trainer's checkpoint folders


@contextmanager
def synchronize(
    trainer: Trainer,
    method: Method | Phases,
    link: Link,
    *,
    seed: int = 0,
    resume_from: str | Path | None = None,
    observer: Callable[[Outcome], None] | None = None,
) -> Iterator[Synchronized]:
    """Within the block `trainer.train()` trains with the other members'.

    trainer      of a process of its own, with an output folder of its own and the same number of steps as the others'
    resume_from  the checkpoint folder given to train(), where it is not in the Trainer's output folder
    yields       the callback; its `sync` is the Synchronizer once training has begun
    raises       ConfigError, for what cannot be and for what thinwire.synchronize refuses
    """
    arguments = trainer.args
    check_apart(arguments.world_size, "the Trainer")
    if arguments.load_best_model_at_end:
        raise ConfigError(
            "load_best_model_at_end=True",
            expected="False: a checkpoint holds the weights of one member, not the model that all agree on",
            mend="leave it out; after training the model is what all agree on, so stop where the loss is best",
        )
    if str(arguments.save_strategy) != "no":
        assert arguments.output_dir is not None
        check_folders(link, arguments.output_dir)
    callback = Synchronized(trainer, method, link, seed=seed, resume_from=resume_from, observer=observer)
    trainer.add_callback(callback)
    try:
        yield callback
    finally:
        trainer.remove_callback(callback)
        callback.abandon()


class Synchronized(TrainerCallback):
    """See `synchronize`. `sync` is the Synchronizer of the last train(), None before the first."""

    def __init__(
        self,
        trainer: Trainer,
        method: Method | Phases,
        link: Link,
        *,
        seed: int,
        resume_from: str | Path | None,
        observer: Callable[[Outcome], None] | None,
    ) -> None:
        self.sync: Synchronizer | None = None
        self._trainer, self._method, self._link = trainer, method, link
        self._seed, self._resume_from, self._observer = seed, resume_from, observer
        self._training = ExitStack()

    def abandon(self) -> None:
        """Take the hooks off again; rounds under way are left as they are."""
        stack, self._training = self._training, ExitStack()
        stop = RuntimeError("training was left")
        stack.__exit__(type(stop), stop, None)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        self.abandon()  # the Trainer begins again when a batch was too large
        check_length(self._link, state.max_steps)
        model, accelerator = more["model"], self._trainer.accelerator
        self.sync = synchronizer_of(
            accelerator, model, more["optimizer"], self._method, self._link, seed=self._seed, observer=self._observer
        )
        if state.global_step:
            _restore(self.sync, model, self._checkpoint(args, state))
        self._training.enter_context(self.sync)
        self._training.enter_context(combining_before_clipping(accelerator, self.sync))
        counting = model.register_forward_pre_hook(self._count, with_kwargs=True)
        self._training.callback(counting.remove)
        self._training.enter_context(_evaluating_consensus(self._trainer, self.sync))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        assert self.sync is not None
        if not args.save_only_model:
            _store(self.sync, more["model"], self._folder(args, state))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        assert self.sync is not None
        stack, self._training = self._training, ExitStack()
        stack.close()  # waits for the rounds under way
        self.sync.take_consensus()

    def _count(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model.training and torch.is_grad_enabled():
            assert self.sync is not None
            self.sync.count(samples_in([*args, *kwargs.values()]))

    def _folder(self, args: TrainingArguments, state: TrainerState) -> Path:
        assert args.output_dir is not None
        return Path(args.output_dir) / f"checkpoint-{state.global_step}"

    def _checkpoint(self, args: TrainingArguments, state: TrainerState) -> Path:
        return self._folder(args, state) if self._resume_from is None else Path(self._resume_from)


@contextmanager
def _evaluating_consensus(trainer: Any, sync: Synchronizer) -> Iterator[None]:
    """Within the block trainer.evaluate sees the model that all members agree on."""
    plain = trainer.evaluate

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        with sync.evaluating():
            return plain(*args, **kwargs)

    trainer.evaluate = evaluate
    try:
        yield
    finally:
        del trainer.evaluate


def _store(sync: Synchronizer, model: nn.Module, folder: Path) -> None:
    partial = folder / f"{STATE}.partial"
    torch.save({"state": sync.state_dict(), "weights": digest(*model.parameters()).hex()}, partial)
    partial.replace(folder / STATE)


def _restore(sync: Synchronizer, model: nn.Module, folder: Path) -> None:
    """Go on from a checkpoint's state; its weights, which the Trainer has loaded by now, must be those it was of."""
    path = folder / STATE
    if not path.exists():
        raise ConfigError(
            f"{path} is missing: the Trainer resumes, and what the method remembers is not beside its checkpoint",
            expected="a checkpoint written within synchronize(), in the Trainer's output folder",
            mend="name it with synchronize(..., resume_from=...); to begin with a trained model instead, load it with "
            "from_pretrained and train without resume_from_checkpoint",
        )
    saved = torch.load(path, map_location="cpu", weights_only=True)
    if saved["weights"] != digest(*model.parameters()).hex():
        raise ConfigError(
            f"{path} belongs to other weights than the Trainer has loaded",
            expected="the checkpoint that train(resume_from_checkpoint=...) was given",
            mend="name the same folder with synchronize(..., resume_from=...)",
        )
    sync.load_state_dict(saved["state"])

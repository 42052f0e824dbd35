"""What one member does in the tests of frameworks, as a program of its own: python member.py TASK OUT."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from task import build, texts

import thinwire
import thinwire.integrations

STEPS, ACCUMULATE, CLIP = 12, 2, 0.5
#: Methods that send gradients, deltas with rounds under way, weights by samples, and one thing after the other.
METHODS = {
    "diloco": thinwire.diloco(every=4),
    "ddp": thinwire.every_step(),
    "fedavg": thinwire.fedavg(every=3),
    "streaming": thinwire.streaming_diloco(every=4),
    "post": thinwire.post_local_sgd(switch=5, every=3),
}
OUT = Path(sys.argv[2])


def size_of(rank: int) -> int:
    """Samples in a batch: unlike on members, so that weights by samples are seen."""
    return 3 + rank


def loader(rank: int) -> DataLoader[dict[str, Tensor]]:
    """Batches for STEPS accumulated steps, the same in every framework."""
    return DataLoader(part(rank), batch_size=size_of(rank))


def part(rank: int) -> Subset[dict[str, Tensor]]:
    needed = STEPS * ACCUMULATE * size_of(rank)
    return Subset(texts(), range(rank * 400, rank * 400 + needed))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def cosine(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def plain(
    link: Any, method: Any, *, by_tokens: bool = False, consensus: bool = False, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """The plain loop that every framework has to equal.

    consensus  what all agree on in the end, rather than what this member has
    by_tokens  as the Trainer counts: summed over the accumulated batch, divided by its labels less one a row
    dtype      of autocast
    """
    model = build()
    optimizer = adamw(model)
    schedule = cosine(optimizer)
    with thinwire.synchronize(model, optimizer, method, link) as sync:
        for group in groups(loader(link.rank)):
            labels = sum(batch["labels"][:, 1:].numel() for batch in group)
            for batch in group:
                with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                    more = {"num_items_in_batch": torch.tensor(labels)} if by_tokens else {}
                    loss = model(**batch, **more).loss
                (loss if by_tokens else loss / ACCUMULATE).backward()
                sync.count(len(batch["labels"]))
            sync.clip_grad_norm_(CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    if consensus:
        sync.take_consensus()
    return weights(model)


def groups(batches: DataLoader[dict[str, Tensor]]) -> Iterator[list[dict[str, Tensor]]]:
    rows = list(batches)
    for start in range(0, len(rows), ACCUMULATE):
        yield rows[start : start + ACCUMULATE]


# --- Trainer


def trainer_of(link: Any, folder: str, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    model = build()
    arguments = {
        "max_steps": STEPS, "per_device_train_batch_size": size_of(link.rank), "max_grad_norm": CLIP,
        "gradient_accumulation_steps": ACCUMULATE, "train_sampling_strategy": "sequential", "save_strategy": "no",
        "report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no",
    }  # fmt: skip
    options = {"output_dir": f"{OUT}/{folder}-{link.rank}"} | arguments | options
    optimizer = adamw(model)
    return Trainer(
        model, TrainingArguments(**options), train_dataset=part(link.rank), eval_dataset=texts()[:40],
        optimizers=(optimizer, cosine(optimizer)),
    )  # fmt: skip


def by_trainer(link: Any, method: Any, **options: Any) -> list[Tensor]:
    from thinwire.integrations.huggingface import synchronize

    trainer = trainer_of(link, "trainer", **options)
    with synchronize(trainer, method, link):
        trainer.train()
    return weights(trainer.model)


def trainer_equals_plain_loop(link: Any) -> dict[str, Any]:
    as_trainer = {"by_tokens": True, "consensus": True}
    pairs = {name: (by_trainer(link, m), plain(link, m, **as_trainer)) for name, m in METHODS.items()}
    half = by_trainer(link, METHODS["ddp"], bf16=True)
    pairs["bf16"] = half, plain(link, METHODS["ddp"], dtype=torch.bfloat16, **as_trainer)
    return pairs


def trainer_resumes(link: Any) -> dict[str, Any]:
    """Saved in mid-round, with a round under way, and gone on from there by other objects."""
    from thinwire.integrations.huggingface import STATE, synchronize

    found = {}
    for name in ("streaming", "ddp"):
        whole = trainer_of(link, name, save_strategy="steps", save_steps=5)
        with synchronize(whole, METHODS[name], link):
            whole.train()
        folder = Path(whole.args.output_dir) / "checkpoint-5"
        assert (folder / STATE).exists()
        again = trainer_of(link, name, save_strategy="no")
        with synchronize(again, METHODS[name], link) as callback:
            again.train(resume_from_checkpoint=str(folder))
        elsewhere = trainer_of(link, f"{name}-elsewhere")
        with synchronize(elsewhere, METHODS[name], link, resume_from=folder):
            elsewhere.train(resume_from_checkpoint=str(folder))
        assert callback.sync.step == STEPS
        found[name] = weights(whole.model), weights(again.model), weights(elsewhere.model)
    return found


def trainer_evaluates(link: Any) -> dict[str, Any]:
    """In mid-round each member has a model of its own, and all evaluate one; at the end all hold it."""
    from thinwire.integrations.huggingface import synchronize

    trainer = trainer_of(link, "evaluated", eval_strategy="steps", eval_steps=3)
    outcomes: list[Any] = []
    with synchronize(trainer, thinwire.diloco(every=5), link, observer=outcomes.append):
        trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return {"losses": losses, "weights": weights(trainer.model), "rounds": len(outcomes)}


def trainer_refuses(link: Any) -> dict[str, str]:
    from thinwire.integrations.huggingface import STATE, synchronize

    def trained(folder: str, resume: str | None = None, resume_from: str | None = None, **options: Any) -> None:
        trainer = trainer_of(link, folder, **options)
        with synchronize(trainer, METHODS["diloco"], link, resume_from=resume_from):
            trainer.train(resume_from_checkpoint=resume)

    own = f"{OUT}/refused-{link.rank}"
    said = {
        "best": refused(lambda: trained("best", load_best_model_at_end=True, save_strategy="steps",
                                        eval_strategy="steps", save_steps=5, eval_steps=5)),
        "folder": refused(lambda: trained("", output_dir=f"{OUT}/one", save_strategy="steps", save_steps=5)),
        "steps": refused(lambda: trained("steps", max_steps=STEPS + link.rank)),
    }  # fmt: skip
    trained("refused", save_strategy="steps", save_steps=6)
    said["weights"] = refused(lambda: trained("refused", f"{own}/checkpoint-6", f"{own}/checkpoint-12"))
    (Path(own) / "checkpoint-6" / STATE).unlink()
    said["missing"] = refused(lambda: trained("refused", f"{own}/checkpoint-6"))
    return said


def trainer_lets_go(link: Any) -> dict[str, Any]:
    """After an exception nothing of ours is left on the Trainer's objects."""
    from transformers import TrainerCallback

    from thinwire.integrations.huggingface import synchronize

    class Stops(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            raise RuntimeError("stop")

    trainer = trainer_of(link, "stopped")
    callbacks = len(trainer.callback_handler.callbacks)
    trainer.add_callback(Stops)
    with suppress(RuntimeError), synchronize(trainer, METHODS["diloco"], link) as callback:
        trainer.train()
    inner = trainer.optimizer.optimizer
    return {
        "callbacks": len(trainer.callback_handler.callbacks) - 1 - callbacks,
        "hooks": len(inner._optimizer_step_post_hooks) + len(trainer.model._forward_pre_hooks),
        "patched": "evaluate" in vars(trainer) or "unscale_gradients" in vars(trainer.accelerator),
        "steps": callback.sync.step,
    }


# --- Accelerate


def by_accelerate(link: Any, method: Any, *, until: int = STEPS, resume: bool = False) -> list[Tensor]:
    """Steps up to `until`, whose state is left in a folder, or the steps after those."""
    from accelerate import Accelerator

    from thinwire.integrations.accelerate import synchronize

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)
    model = build()
    optimizer = adamw(model)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, cosine(optimizer))
    folder = f"{OUT}/accelerate-{link.rank}"
    rows = list(loader(link.rank))
    with synchronize(accelerator, model, optimizer, method, link) as sync:
        accelerator.register_for_checkpointing(sync)
        if resume:
            accelerator.load_state(folder)
        for number in range(sync.step * ACCUMULATE, until * ACCUMULATE):
            batch = rows[number]
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                sync.count(len(batch["labels"]))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        if until < STEPS:
            accelerator.save_state(folder)
    return weights(accelerator.unwrap_model(model))


def accelerate_equals_plain_loop(link: Any) -> dict[str, Any]:
    return {name: (by_accelerate(link, m), plain(link, m)) for name, m in METHODS.items() if name != "fedavg"}


def accelerate_resumes(link: Any) -> dict[str, Any]:
    whole = by_accelerate(link, METHODS["streaming"])
    by_accelerate(link, METHODS["streaming"], until=5)
    return {"streaming": (whole, by_accelerate(link, METHODS["streaming"], resume=True))}


# --- Lightning


def by_fabric(link: Any, method: Any) -> list[Tensor]:
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    net = build()
    inner = adamw(net)
    model, optimizer = fabric.setup(net, inner)
    schedule = cosine(inner)
    with thinwire.synchronize(net, inner, method, link) as sync:
        for group in groups(loader(link.rank)):
            for batch in group:
                fabric.backward(model(**batch).loss / ACCUMULATE)
                sync.count(len(batch["labels"]))
            sync.clip_grad_norm_(CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return weights(net)


def fabric_equals_plain_loop(link: Any) -> dict[str, Any]:
    return {name: (by_fabric(link, METHODS[name]), plain(link, METHODS[name])) for name in ("ddp", "streaming")}


def lightning_of(link: Any, method: Any, folder: str, **options: Any) -> tuple[Any, Any, Any]:
    from lightning.pytorch import LightningModule, Trainer

    from thinwire.integrations.lightning import Synchronized

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = build()
            self.seen: list[float] = []

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            return self.net(**batch).loss

        def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
            self.seen.append(float(self.net(**batch).loss))

        def configure_optimizers(self) -> Any:
            optimizer = adamw(self.net)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine(optimizer), "interval": "step"}}

    callback = Synchronized(method, link)
    defaults = {
        "max_steps": STEPS, "max_epochs": None, "enable_checkpointing": False, "num_sanity_val_steps": 0,
        "gradient_clip_val": CLIP, "accumulate_grad_batches": ACCUMULATE,
        "default_root_dir": f"{OUT}/{folder}-{link.rank}",
    }  # fmt: skip
    others = options.pop("callbacks", [])
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, callbacks=[callback, *others], enable_progress_bar=False,
        enable_model_summary=False, **(defaults | options),
    )  # fmt: skip
    return trainer, Module(), callback


def by_lightning(link: Any, method: Any, **options: Any) -> list[Tensor]:
    trainer, module, _ = lightning_of(link, method, "lightning", **options)
    trainer.fit(module, loader(link.rank))
    return weights(module.net)


def lightning_equals_plain_loop(link: Any) -> dict[str, Any]:
    pairs = {name: (by_lightning(link, m), plain(link, m, consensus=True)) for name, m in METHODS.items()}
    half = by_lightning(link, METHODS["ddp"], precision="bf16-mixed")
    pairs["bf16"] = half, plain(link, METHODS["ddp"], dtype=torch.bfloat16)
    return pairs


def lightning_resumes(link: Any) -> dict[str, Any]:
    """Saved at the end of an epoch, which is in mid-round, and gone on from there by other objects."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    found = {}
    for name in ("streaming", "ddp"):
        folder = f"{OUT}/lightning-{name}-{link.rank}/saved"
        saving = ModelCheckpoint(folder, filename="epoch{epoch}", save_top_k=-1, auto_insert_metric_name=False)
        epochs = {"max_steps": -1, "max_epochs": 2, "limit_train_batches": 5 * ACCUMULATE}
        whole = lightning_of(link, METHODS[name], f"lightning-{name}", callbacks=[saving], **epochs,
                             enable_checkpointing=True)  # fmt: skip
        whole[0].fit(whole[1], loader(link.rank))
        again = lightning_of(link, METHODS[name], f"lightning-{name}", **epochs)
        again[0].fit(again[1], loader(link.rank), ckpt_path=f"{folder}/epoch0.ckpt")
        assert again[2].sync.step == whole[2].sync.step == 10
        found[name] = weights(whole[1].net), weights(again[1].net)
    return found


def lightning_evaluates(link: Any) -> dict[str, Any]:
    trainer, module, _ = lightning_of(
        link, thinwire.diloco(every=5), "evaluated", val_check_interval=3 * ACCUMULATE, num_sanity_val_steps=1
    )
    trainer.fit(module, loader(link.rank), DataLoader(texts()[:8], batch_size=8))
    return {"losses": module.seen[1:], "weights": weights(module.net)}


def lightning_refuses(link: Any) -> dict[str, str]:
    def fitted(change: Callable[[Any], None] | None = None, **options: Any) -> None:
        trainer, module, _ = lightning_of(link, METHODS["diloco"], "refused", **options)
        if change is not None:
            change(module)
        trainer.fit(module, loader(link.rank))

    def two_optimizers(module: Any) -> None:
        module.automatic_optimization = False
        module.configure_optimizers = lambda: (adamw(module.net), adamw(module.net))

    def lbfgs(module: Any) -> None:
        module.configure_optimizers = lambda: torch.optim.LBFGS(module.parameters())

    trainer, module, _ = lightning_of(link, METHODS["ddp"], "refused")
    lbfgs(module)
    said = {
        "steps": refused(lambda: fitted(max_steps=STEPS + link.rank)),
        "optimizers": refused(lambda: fitted(two_optimizers, gradient_clip_val=None, accumulate_grad_batches=1)),
        "folder": refused(lambda: fitted(default_root_dir=f"{OUT}/one", enable_checkpointing=True)),
        "lbfgs": refused(lambda: trainer.fit(module, loader(link.rank))),
    }
    said["hooks"] = str(len(trainer.optimizers[0]._optimizer_step_pre_hooks))
    return said


def refused(action: Callable[[], object]) -> str:
    try:
        action()
    except (thinwire.ThinwireError, TypeError) as error:
        return str(error)
    return "not refused"


def main() -> None:
    torch.set_num_threads(1)
    with thinwire.integrations.join() as link:
        torch.save(globals()[sys.argv[1]](link), OUT / f"{link.rank}.pt")


if __name__ == "__main__":
    main()

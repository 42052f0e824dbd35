"""Lightning's Trainer on several members: torchrun --nproc-per-node 3 examples/lightning_trainer.py"""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer
from task import STEPS, batches, build, tell

import thinwire.integrations
from thinwire.integrations.lightning import Synchronized


class Counting(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = build()
        self.losses = []

    def training_step(self, batch, index):
        loss = self.net(**batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=3e-3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


flags = argparse.ArgumentParser()
flags.add_argument("--out", default="runs/lightning")
options = flags.parse_args()

with thinwire.integrations.join() as link:
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        gradient_clip_val=1.0,
        default_root_dir=f"{options.out}/member-{link.rank}",  # every member has checkpoints of its own
        callbacks=[Synchronized(thinwire.diloco(every=10), link)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Counting()
    trainer.fit(module, batches(link.rank, len(link.members)))
    tell(module.losses, module.net)

"""The Hugging Face Trainer on several members: torchrun --nproc-per-node 3 examples/trainer.py"""

import argparse

from task import BATCH, STEPS, build, part, tell
from transformers import Trainer, TrainingArguments

import thinwire.integrations
from thinwire.integrations.huggingface import synchronize

flags = argparse.ArgumentParser()
flags.add_argument("--out", default="runs/trainer")
flags.add_argument("--every", type=int, default=10)
flags.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
options = flags.parse_args()

with thinwire.integrations.join() as link:
    arguments = TrainingArguments(
        output_dir=f"{options.out}/member-{link.rank}",  # every member has checkpoints of its own
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // 2,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        logging_steps=1,
        save_steps=25,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    mine = part(link.rank, len(link.members))
    trainer = Trainer(build(), arguments, train_dataset=mine)
    with synchronize(trainer, thinwire.diloco(every=options.every), link):
        trainer.train(resume_from_checkpoint=options.resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    tell(losses, trainer.model)

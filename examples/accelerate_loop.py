"""A loop with Accelerate on several members: torchrun --nproc-per-node 3 examples/accelerate_loop.py"""

import torch
from accelerate import Accelerator
from task import STEPS, batches, build, tell

import thinwire.integrations
from thinwire.integrations.accelerate import synchronize

with thinwire.integrations.join() as link:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS // 2)
    loader = batches(link.rank, len(link.members))
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)

    losses = []
    with synchronize(accelerator, model, optimizer, thinwire.diloco(every=10), link):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    tell(losses, accelerator.unwrap_model(model))

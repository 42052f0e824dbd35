"""A loop with Lightning Fabric on several members: torchrun --nproc-per-node 3 examples/fabric.py"""

import torch
from lightning.fabric import Fabric
from task import batches, build, tell

import thinwire.integrations

with thinwire.integrations.join() as link:
    fabric = Fabric(accelerator="cpu", devices=1)
    net = build()
    adamw = torch.optim.AdamW(net.parameters(), lr=3e-3)
    model, optimizer = fabric.setup(net, adamw)
    loader = fabric.setup_dataloaders(batches(link.rank, len(link.members)))

    losses = []
    with thinwire.synchronize(net, adamw, thinwire.diloco(every=10), link) as sync:
        for batch in loader:
            loss = model(**batch).loss
            fabric.backward(loss)
            sync.clip_grad_norm_(1.0)  # in place of fabric.clip_gradients
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    tell(losses, net)

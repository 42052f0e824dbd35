"""The same loop on several members: torchrun --nproc-per-node 3 examples/plain_loop.py"""

import torch
from task import batches, build, tell

import thinwire


def train(model, optimizer, loader):
    losses = []
    for batch in loader:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


model = build()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
with thinwire.join() as link, thinwire.synchronize(model, optimizer, thinwire.diloco(every=10), link):
    losses = train(model, optimizer, batches(link.rank, len(link.members)))
tell(losses, model)

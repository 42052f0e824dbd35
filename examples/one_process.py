"""A training loop of one process, as it may have been before: python examples/one_process.py"""

import torch
from task import batches, build, tell


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
losses = train(model, optimizer, batches(0, 1))
tell(losses, model)

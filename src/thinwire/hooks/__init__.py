"""Gradients of other engines over our links: PyTorch's own data parallelism, with what it sends made small.

model = DistributedDataParallel(net)
model.register_comm_hook(*thinwire.hooks.ddp(model, "feedback(topk(1/64) | int4)"))

fully_shard(net)
gradients = thinwire.hooks.fsdp(net, "int8")
"""

from thinwire.hooks.ddp import ddp
from thinwire.hooks.fsdp import fsdp

__all__ = ["ddp", "fsdp"]

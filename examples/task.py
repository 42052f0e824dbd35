"""What the examples train: a small GPT that learns to count in steps, from random weights, without a download."""

from __future__ import annotations

import hashlib
import sys

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers import GPT2Config, GPT2LMHeadModel

WORDS, CONTEXT, TEXTS, BATCH, STEPS = 32, 16, 1024, 8, 60


def build() -> GPT2LMHeadModel:
    """The same weights in every process: all start from one seed."""
    torch.manual_seed(0)
    size = {"vocab_size": WORDS, "n_positions": CONTEXT, "n_embd": 32, "n_layer": 2, "n_head": 2}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**size, **dropout, bos_token_id=0, eos_token_id=0))
    model.loss_type = "ForCausalLM"
    return model


def texts() -> list[dict[str, Tensor]]:
    """Rows such as 3, 5, 7, 9, ...: a start and a stride, both by chance."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randint(WORDS, (TEXTS, 1), generator=generator)
    stride = torch.randint(1, 5, (TEXTS, 1), generator=generator)
    rows = (start + stride * torch.arange(CONTEXT)) % WORDS  # [TEXTS, CONTEXT]
    return [{"input_ids": row, "labels": row} for row in rows]


def part(rank: int, members: int) -> Subset[dict[str, Tensor]]:
    """What one member reads: every text is one member's."""
    return Subset(texts(), range(rank, TEXTS - TEXTS % members, members))


def batches(rank: int, members: int) -> DataLoader[dict[str, Tensor]]:
    """Batches of one member's part, for STEPS steps."""
    mine = part(rank, members)
    return DataLoader(Subset(mine, [i % len(mine) for i in range(STEPS * BATCH)]), batch_size=BATCH)


def tell(losses: list[float], model: nn.Module) -> None:
    """One line a member; equal digests are equal weights, to the bit."""
    raw = b"".join(value.detach().cpu().numpy().tobytes() for value in model.parameters())
    digest = hashlib.sha256(raw).hexdigest()[:16]
    sys.stdout.write(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, weights {digest}\n")  # whole: members share it

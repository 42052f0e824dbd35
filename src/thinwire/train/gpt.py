"""A compact GPT: pre-norm blocks, causal attention, GELU, learned positions.

    h = embed(token) + position
    h = h + attention(norm(h));  h = h + mlp(norm(h))        `layers` times
    logits = norm(h) @ head^T                                the head is the embedding's own matrix when tied

Init    every matrix normal(0, 0.02); the two that write to the residual stream scaled by 1/sqrt(2 layers), so that
        the stream's variance does not grow with depth; biases zero. Drawn from torch's global generator: seed first.
Source  Radford et al. 2019 (GPT-2). No dropout: the models here see more data than they can remember.

Letters: b batch, t tokens, h heads, d width of a head, w width of the model, v vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinwire.errors import ConfigError

_INIT_STD = 0.02


@dataclass(frozen=True)
class Size:
    """A shape of the body; vocabulary and context come from the data."""

    layers: int
    heads: int
    width: int


#: By parameter count with bytes as vocabulary; 124M is GPT-2 small and has that count with GPT-2's 50257 tokens.
SIZES: dict[str, Size] = {
    "0.2M": Size(layers=4, heads=4, width=64),
    "0.9M": Size(layers=4, heads=4, width=128),
    "3M": Size(layers=6, heads=6, width=192),
    "10M": Size(layers=8, heads=5, width=320),
    "30M": Size(layers=12, heads=7, width=448),
    "124M": Size(layers=12, heads=12, width=768),
}


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.read = nn.Linear(width, 3 * width)
        self.write = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x, returns: [b, t, w]."""
        b, t, w = x.shape
        q, k, v = self.read(x).view(b, t, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)  # 3 x [b, h, t, d]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [b, h, t, d]
        out: Tensor = self.write(mixed.transpose(1, 2).reshape(b, t, w))  # [b, t, w]
        return out


class Block(nn.Module):
    """Attention, then an MLP four times as wide, each on a normalised copy of the residual stream."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(heads, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_read = nn.Linear(width, 4 * width)
        self.mlp_write = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x, returns: [b, t, w]."""
        x = x + self.attention(self.attention_norm(x))
        wide = F.gelu(self.mlp_read(self.mlp_norm(x)))  # [b, t, 4w]
        out: Tensor = x + self.mlp_write(wide)
        return out


class GPT(nn.Module):
    """tokens -> logits of the next token at every position."""

    def __init__(self, vocab: int, context: int, layers: int, heads: int, width: int, *, tied: bool = True) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(
                f"GPT: width {width} does not divide among {heads} heads",
                expected="a width that is a multiple of the number of heads",
                mend=f"set width to {heads * max(1, round(width / heads))}",
            )
        self.context = context
        self.embed = nn.Embedding(vocab, width)
        self.position = nn.Parameter(torch.empty(context, width))
        self.blocks = nn.ModuleList(Block(heads, width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self._initialise(layers)

    def _initialise(self, layers: int) -> None:
        for name, parameter in self.named_parameters():  # a tied matrix comes once
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
            elif "norm" not in name:
                residual = name.endswith("write.weight")
                nn.init.normal_(parameter, std=_INIT_STD / math.sqrt(2 * layers) if residual else _INIT_STD)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 [b, t] with t at most the context; returns [b, t, v]."""
        t = tokens.shape[1]
        if t > self.context:
            raise ConfigError(
                f"GPT: {t} tokens in a row",
                expected=f"at most the context, {self.context}",
                mend="shorten the sequences, or build the model with a longer context",
            )
        x = self.embed(tokens) + self.position[:t]  # [b, t, w]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))  # [b, t, v]
        return logits


def gpt(size: str, *, vocab: int, context: int, tied: bool = True) -> GPT:
    """A GPT of a size in `SIZES`."""
    shape = SIZES[size]
    return GPT(vocab, context, shape.layers, shape.heads, shape.width, tied=tied)


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats.

    logits   [b, t, v], of any float dtype: the sum over the vocabulary is taken in float32
    targets  int64 [b, t]: the token that follows each position
    """
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

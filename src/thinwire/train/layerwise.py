"""Optimizers that treat a matrix as one thing: Muon, LAMB and LARS, each with another one for what is no matrix to it.

    muon   M <- mu M + G;  W <- (1 - lr d) W - lr c O(mu M + G)     O: nearest orthogonal matrix, by Newton and Schulz
    lamb   u <- m / (sqrt(v) + eps) + d W;  W <- W - lr |W| / |u| u
    lars   u <- G + d W;  P <- mu P + eta |W| / (|G| + d |W|) u;  W <- W - lr P
    the rest of the parameters: AdamW (muon, lamb), SGD with momentum (lars)

Each returns the optimizers of a model, over disjoint parameters: hand them to `thinwire.synchronize` as they are.

State   muon, lars one vector of the model's size; lamb two.
Cost    muon: 15 products of matrices a matrix and step, in bfloat16, which processors without bfloat16 instructions
        compute about eight times as slowly as float32.
Source  Muon: Jordan et al. 2024, as in torch.optim; which parameters it takes: MuLoCo, Thérien et al. 2025,
        arXiv:2505.23725. LAMB: You et al. 2020, arXiv:1904.00962, Alg. 2. LARS: You et al. 2017, arXiv:1708.03888.
Differs lamb: no bias correction of m and v, as in the paper's Alg. 2 without it; with d = 0 the ratio cancels it. The
        ratio's |W| is not clamped, and its denominator has an eps of 1e-6. lars: lr stands outside the momentum, which
        is the same while lr does not change. Both come from the library pytorch_optimizer (extra `optimizers`), whose
        own defaults differ: its Lamb divides the step by the bias correction after the ratio, which makes the first
        step ten times as long, decays beside the ratio, and clamps |W| at 10.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from torch import nn

from thinwire.errors import ConfigError
from thinwire.train.tasks import import_extra

Optimizers = list[torch.optim.Optimizer]

#: The key of a parameter group for its learning rate as a multiple of the run's.
SHARE = "lr_share"


def muon(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = "match_rms_adamw",
    adamw_lr: float | None = None,
    adamw_betas: tuple[float, float] = (0.9, 0.95),
) -> Optimizers:
    """Muon for hidden matrices, AdamW for embeddings, the head, norms and biases.

    adjust_lr_fn  c above: `match_rms_adamw` 0.2 sqrt(max(rows, columns)), so that steps are as large as AdamW's and one
                  learning rate does for both; `original` sqrt(max(1, rows / columns))
    adamw_lr      learning rate of AdamW's parameters at its highest; `lr` if None
    """
    hidden = {id(matrix) for matrix in hidden_matrices(model)}
    matrices = [p for p in _trained(model) if id(p) in hidden]
    rest = [p for p in _trained(model) if id(p) not in hidden]
    if not matrices:
        raise ConfigError(
            "the model has no matrix for Muon beside embeddings and its last layer",
            expected="hidden layers with weight matrices that are trained",
            mend="use AdamW for this model",
        )
    first = torch.optim.Muon(
        matrices, lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov, ns_steps=ns_steps,
        adjust_lr_fn=adjust_lr_fn,
    )  # fmt: skip
    return [first, *_adamw(rest, lr if adamw_lr is None else adamw_lr, weight_decay, adamw_betas, 1e-8, of=lr)]


def lamb(
    model: nn.Module,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
) -> Optimizers:
    """LAMB for matrices; AdamW without decay, which is LAMB without its ratio, for biases and norms."""
    library = import_extra("pytorch_optimizer", extra="optimizers", purpose="LAMB")
    matrices, vectors = _by_dimension(model)
    found: Optimizers = []
    if matrices:
        first = library.Lamb(
            matrices, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, weight_decouple=False, adam_debias=True
        )
        first.clamp = math.inf
        found.append(first)
    return found + _adamw(vectors, lr, 0.0, betas, eps, of=lr)


def lars(
    model: nn.Module,
    *,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    trust: float = 0.001,
    nesterov: bool = False,
) -> Optimizers:
    """LARS for matrices; the same momentum without ratio and decay for biases and norms.

    trust  eta above
    """
    library = import_extra("pytorch_optimizer", extra="optimizers", purpose="LARS")
    made: torch.optim.Optimizer = library.LARS(
        _trained(model), lr=lr, momentum=momentum, weight_decay=weight_decay, trust_coefficient=trust, nesterov=nesterov
    )
    return [made]


#: By the name used in configurations and on the command line.
LAYERWISE: Mapping[str, Callable[..., Optimizers]] = {"Muon": muon, "LAMB": lamb, "LARS": lars}


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trained weight matrices of layers between the embeddings and the head.

    A matrix of a layer is called `weight`; nn.Embedding's are embeddings, tied or not; the last layer of the model, in
    the order of its modules, is its head. A position table that is a parameter of the model itself is none of them.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    layers = [(name, p) for name, p in model.named_parameters(remove_duplicate=False) if p.ndim == 2]
    layers = [(name, p) for name, p in layers if name.rpartition(".")[2].endswith("weight")]
    head = {id(layers[-1][1])} if layers else set()
    found = {id(p): p for _, p in layers if p.requires_grad and id(p) not in embeddings | head}
    return list(found.values())


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _by_dimension(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    trained = _trained(model)
    return [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]


def _adamw(
    parameters: Iterable[nn.Parameter], lr: float, decay: float, betas: tuple[float, float], eps: float, *, of: float
) -> Optimizers:
    """AdamW of what is left, if anything is."""
    group = {"params": list(parameters), SHARE: lr / of}
    return [torch.optim.AdamW([group], lr=lr, betas=betas, eps=eps, weight_decay=decay)] if group["params"] else []

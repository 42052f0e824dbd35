"""From a universal checkpoint to a folder that Hugging Face libraries load.

    task                         what is written                                                  loaded by
    huggingface                  the model under its own configuration, and its tokenizer         AutoModelFor...
    huggingface, lora_rank > 0   the adapters, and a classifier's head; the tokenizer             PeftModel
    text                         our GPT as a GPT-2, and the tokenizer unless it was bytes        AutoModelForCausalLM

Files are those libraries' own `save_pretrained`'s. Our GPT is a GPT-2 by another layout: the same blocks, norms, GELU
(not its approximation) and positions, with matrices transposed, as GPT-2 keeps them.

Error   none in the values; logits of a model of the library's own are the same to the bit, those of a GPT-2 differ from
        our GPT's by rounding: a transposed matrix product may add up in another order
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thinwire.config import Run, loads
from thinwire.errors import ConfigError
from thinwire.train.gpt import SIZES
from thinwire.train.huggingface import HuggingFaceOptions, load_tokenizer, quiet, whole_model
from thinwire.train.tasks import import_extra
from thinwire.train.text import BYTES, TextOptions
from thinwire.train.universal import Universal

_BLOCK = {
    "attention_norm": "ln_1", "attention.read": "attn.c_attn", "attention.write": "attn.c_proj",
    "mlp_norm": "ln_2", "mlp_read": "mlp.c_fc", "mlp_write": "mlp.c_proj",
}  # fmt: skip
_AROUND = {
    "embed.weight": "transformer.wte.weight", "position": "transformer.wpe.weight", "head.weight": "lm_head.weight",
    "norm.weight": "transformer.ln_f.weight", "norm.bias": "transformer.ln_f.bias",
}  # fmt: skip


def write(out: Path, made: Universal, *, shard_bytes: int) -> str:
    """Write the folder, whole or not at all.

    shard_bytes  of one weights file at most; more lie in several, beside an index
    returns      in words what it is, and by which class it is loaded
    raises       ConfigError if `out` is there already, if the task's model has no such format, or if its pretrained
                 model is not the one that the run began with; OSError as the file system says it
    """
    if out.exists():
        raise ConfigError(
            f"{out} is there already", expected="a name that is free", mend="choose another one, or remove the folder"
        )
    run = loads(made.config, source="the checkpoint's run")
    state = weights(made)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as place:
        partial = Path(place) / "whole"
        model, tokenizer, words = _as_loaded(run, made, state)
        with quiet(import_extra("transformers", extra="hf", purpose="--to hf")):
            # Embeddings are not adapted: peft would ask the hub whether their size is the base's.
            adapters = {"save_embedding_layers": False} if _is_adapted(run) else {"max_shard_size": shard_bytes}
            model.save_pretrained(partial, **adapters)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
        partial.rename(out)
    return words


def weights(made: Universal) -> dict[str, Tensor]:
    """The model's `state_dict()`, each tensor in its own dtype."""
    state = {name: record.value.to(getattr(torch, record.dtype)) for name, record in made.records.items()}
    return state | {name: state[of] for name, of in made.aliases.items()}


def _as_loaded(run: Run, made: Universal, state: dict[str, Tensor]) -> tuple[Any, Any, str]:
    """The library's model with the checkpoint's weights, its tokenizer if there is one, and what it is."""
    if isinstance(run.task, TextOptions):
        return _gpt2(run.task, made, state), _own_tokenizer(run.task), _words_of_gpt(run.task)
    if not isinstance(run.task, HuggingFaceOptions):
        raise ConfigError(
            f"a run of {type(run.task).__name__}: its model has no Hugging Face format",
            expected="a run of the task huggingface, whole or with LoRA adapters, or of the task text",
            mend="take the weights alone, under the model's own names: --to weights",
        )
    model = whole_model(run.task)
    if adapted := _is_adapted(run):
        before = {name: value for name, value in model.state_dict().items() if _is_frozen(made, name)}
        _check_same(run.task.path, before, state)
    _take(model, state, run.task.path)
    words = f"{type(model).__name__}, for AutoModelFor{_KIND[run.task.head]}.from_pretrained"
    if adapted:
        words = f"LoRA adapters of {run.task.path}, for peft.PeftModel.from_pretrained"
    return model, load_tokenizer(run.task.path), words


_KIND = {"causal": "CausalLM", "classifier": "SequenceClassification"}


def _is_adapted(run: Run) -> bool:
    return isinstance(run.task, HuggingFaceOptions) and run.task.lora_rank > 0


def _is_frozen(made: Universal, name: str) -> bool:
    """Whether adapters rest on it. A head in whose place a trained one is kept is not used, and may be newly drawn."""
    return name in made.records and made.records[name].role == "frozen" and ".original_module." not in name


def _check_same(path: str, before: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Adapters alone are written: what they were trained upon must still be what lies at the path."""
    changed = [name for name, value in before.items() if not torch.equal(value, state[name])]
    if changed:
        raise ConfigError(
            f"{path} is another model than the one that this run began with: {changed[0]} differs",
            expected="the pretrained model of the run's beginning: adapters fit no other",
            mend="put it back there, or take the weights alone: --to weights",
        )


def _take(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    try:
        model.load_state_dict(dict(state))
    except RuntimeError as error:
        raise ConfigError(
            f"the checkpoint does not fit the model of {what}: {str(error).splitlines()[-1].strip()}",
            expected="the same names and shapes as when the run began",
            mend="put the model back there, or take the weights alone: --to weights",
        ) from error


def _gpt2(options: TextOptions, made: Universal, state: Mapping[str, Tensor]) -> Any:
    transformers = import_extra("transformers", extra="hf", purpose="--to hf")
    vocab, width = made.records["embed.weight"].value.shape
    shape = SIZES[options.size]
    config = transformers.GPT2Config(
        vocab_size=vocab, n_positions=options.context, n_embd=width, n_layer=shape.layers, n_head=shape.heads,
        activation_function="gelu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None,
        eos_token_id=None, tie_word_embeddings=options.tied,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).to(state["embed.weight"].dtype)
    _take(model, {_name_in_gpt2(name): _as_gpt2(name, value) for name, value in state.items()}, "a GPT-2")
    return model


def _name_in_gpt2(name: str) -> str:
    if name in _AROUND:
        return _AROUND[name]
    _, layer, rest = name.split(".", 2)
    part, _, kind = rest.rpartition(".")
    return f"transformer.h.{layer}.{_BLOCK[part]}.{kind}"


def _as_gpt2(name: str, value: Tensor) -> Tensor:
    """Matrices of blocks are [in, out] there, [out, in] here."""
    return value.T.contiguous() if name.startswith("blocks.") and value.ndim == 2 else value


def _own_tokenizer(options: TextOptions) -> Any:
    if options.tokenizer == BYTES:
        return None
    transformers = import_extra("transformers", extra="hf", purpose="--to hf")
    if not Path(options.tokenizer).is_file():
        raise ConfigError(
            f"tokenizer = {options.tokenizer!r}, which the run was trained with, is not there",
            expected="the tokenizer.json of the run: it goes into the folder",
            mend="run this where that path leads to it, or take the weights alone: --to weights",
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_file=options.tokenizer)


def _words_of_gpt(options: TextOptions) -> str:
    told = "; no tokenizer: a token is a byte of UTF-8" if options.tokenizer == BYTES else ""
    return f"GPT2LMHeadModel, for AutoModelForCausalLM.from_pretrained{told}"

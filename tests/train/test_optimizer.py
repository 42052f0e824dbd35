import pytest
import torch
from torch import nn

from thinwire.errors import ConfigError
from thinwire.train.optimizer import OptimizerOptions, options_of


def test_options_reach_the_class():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    options = OptimizerOptions("SGD", lr=0.5, options={"momentum": 0.9, "nesterov": True})
    (optimizer,) = options.build(model)
    assert isinstance(optimizer, torch.optim.SGD)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["nesterov"]) == (0.5, 0.9, True)
    assert len(group["params"]) == 1  # what is frozen is not touched, not even by weight decay


def test_every_class_that_needs_no_closure_is_offered():
    names = ["AdamW", "SGD", "Adam", "RMSprop", "Adafactor"]
    assert all("weight_decay" in options_of(name) for name in names)
    assert "lr" not in options_of("AdamW")
    with pytest.raises(ConfigError) as caught:
        OptimizerOptions("LBFGS")
    assert caught.value.wrong == "torch.optim has no optimizer 'LBFGS' to use here"
    with pytest.raises(ConfigError, match=r"did you mean 'AdamW'\?"):
        OptimizerOptions("Adamw")


def test_constant_after_a_warm_up():
    options = OptimizerOptions(lr=1.0, warmup_steps=4)
    assert [options.lr_at(step, steps=100) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert OptimizerOptions(lr=1.0).lr_at(0, steps=10) == 1.0


def test_cosine_falls_from_lr_to_zero():
    options = OptimizerOptions(lr=2.0, warmup_steps=2, schedule="cosine")
    rates = [options.lr_at(step, steps=10) for step in range(11)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[6] == pytest.approx(1.0)
    assert rates[10] == 0.0
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_what_the_class_refuses():
    options = OptimizerOptions(options={"betas": (2.0, 0.9)})
    with pytest.raises(ConfigError) as caught:
        options.build(nn.Linear(1, 1))
    assert caught.value.wrong == (
        "torch.optim.AdamW refuses lr=0.002 with {'betas': (2.0, 0.9)}: Invalid beta parameter at index 0: 2.0"
    )


@pytest.mark.parametrize("wrong", [{"lr": 0.0}, {"clip_norm": -1.0}, {"accumulate": 0}, {"schedule": "linear"}])
def test_options_are_checked_on_construction(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ConfigError, match=f"OptimizerOptions: {name} = {value!r}"):
        OptimizerOptions(**wrong)

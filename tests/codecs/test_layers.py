"""Layers: what they keep apart, what stays as it is, and how they are cut into shards."""

from __future__ import annotations

import pytest
import torch

from thinwire.codecs import feedback, fp32, int4, int8, layers, parse, topk, zstd
from thinwire.codecs.layers import Layers
from thinwire.errors import ConfigError, PacketError
from thinwire.randomness import mix

SHAPES = ((4, 32), (32,), (8, 16), (2, 2))
N = 128 + 32 + 128 + 4


def vector(seed: int = 0) -> torch.Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("inner", [topk(1 / 8), int4, int8, topk(1 / 4) | int4 | zstd], ids=lambda codec: codec.spec)
def test_every_layer_is_what_its_codec_makes_of_it_alone(inner):
    x = vector()
    codec = layers(inner, small=16).fit(SHAPES)
    decoded = codec.decode(codec.encode(x, 7), N, 7).split([128, 32, 128, 4])
    for number, (piece, got) in enumerate(zip(x.split([128, 32, 128, 4]), decoded, strict=True)):
        alone = inner if number in (0, 2) else fp32
        key = mix(7, number)
        assert torch.equal(got, alone.decode(alone.encode(piece, key), len(piece), key))


def test_a_quiet_layer_gets_its_share():
    """Top-k over the whole vector would spend everything on the loud one."""
    x = torch.cat([100 * torch.ones(1024), torch.ones(1024)])
    shapes = ((32, 32), (32, 32))
    kept = layers(topk(1 / 4)).fit(shapes).decode(layers(topk(1 / 4)).fit(shapes).encode(x, 0), 2048, 0)
    assert [int((half != 0).sum()) for half in kept.split(1024)] == [256, 256]
    whole = topk(1 / 8).decode(topk(1 / 8).encode(x, 0), 2048, 0)
    assert [int((half != 0).sum()) for half in whole.split(1024)] == [256, 0]


def test_small_parameters_and_those_of_one_dimension_stay_as_they_are():
    x = vector()
    for small, lossy in ((0, {0, 2, 3}), (16, {0, 2}), (1024, set())):
        codec = layers(topk(1 / 4), small=small).fit(SHAPES)
        decoded = codec.decode(codec.encode(x, 0), N, 0).split([128, 32, 128, 4])
        same = [torch.equal(a, b) for a, b in zip(decoded, x.split([128, 32, 128, 4]), strict=True)]
        assert {number for number, equal in enumerate(same) if not equal} == lossy


def test_a_codec_for_each_layer():
    codec = layers(int8, topk(1 / 2), small=16).fit(SHAPES)
    assert codec.layout(N) == {
        "float32": (torch.float32, 1 + 32 + 64 + 4),  # a scale, a bias, half of the second matrix, the small one
        "int8": (torch.int8, 128),
        **{name: entry for name, entry in codec.layout(N).items() if name not in ("float32", "int8")},
    }
    with pytest.raises(ConfigError, match="3 codecs for 2 parameters that are not small\n  expected  one for all"):
        layers(int8, int4, topk(1 / 2), small=16).fit(SHAPES)


@pytest.mark.parametrize("cut", [0, 1, 100, 128, 150, 200, N])
def test_a_shard_is_written_by_its_layers(cut):
    x = vector()
    codec = layers(int4(block=2), small=0).fit(SHAPES)
    whole = codec.decode(codec.encode(x, 0), N, 0)
    parts = []
    for begin, end in ((0, cut), (cut, N)):
        part = codec.part(begin, end)
        assert part.spec == codec.spec
        parts.append(part.decode(part.encode(x[begin:end], 0), end - begin, 0))
    if cut % 2 == 0:  # blocks of two are then the same
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(torch.cat(parts)[128:160], x[128:160]), "the bias stays as it is"


def test_the_expression_leaves_the_shapes_out():
    codec = layers(topk(1 / 64) | int4, small=256)
    assert codec.spec == "layers(topk(0.015625) | int4, small=256)"
    assert parse(codec.fit(SHAPES).spec).fit(SHAPES) == codec.fit(SHAPES)  # type: ignore[union-attr]
    assert parse("layers(int8, int4)") == layers(int8, int4)
    assert Layers((int8,), label="layers(#12)").spec == "layers(#12)"


def test_what_is_no_codec_or_no_size_is_refused():
    with pytest.raises(ConfigError, match="layers without a codec\n  expected  a codec for all layers"):
        parse("layers()")
    with pytest.raises(ConfigError, match=r"layers of ErrorFeedback\("):
        parse("layers(feedback(topk(1/64)))")
    with pytest.raises(ConfigError, match="layers are to be small below -1 elements"):
        layers(int8, small=-1)


def test_lengths_that_do_not_add_up_are_refused():
    codec = layers(topk(1 / 4) | int8 | zstd, small=16).fit(SHAPES)
    fields = dict(codec.encode(vector(), 0))
    for change in (torch.tensor([-1]), torch.tensor([10**6])):
        size = fields["size"].clone()
        size[0] = change
        with pytest.raises(PacketError, match="field 'size' says"):
            codec.decode({**fields, "size": size}, N, 0)
    size = fields["size"].clone()
    size[0] -= 1
    with pytest.raises(PacketError):
        codec.decode({**fields, "size": size}, N, 0)
    with pytest.raises(PacketError, match="field 'size' has 2 entries"):
        codec.decode({**fields, "size": fields["size"][:2]}, N, 0)
    with pytest.raises(PacketError, match=rf"{N - 1} elements\n  expected  {N}: the elements of the layers' shapes"):
        codec.decode(fields, N - 1, 0)


def test_feedback_goes_around_it_when_it_knows_its_shapes_too() -> None:
    """Its class is asked for a number of elements that is not the model's."""
    shapes = ((40, 40), (40,), (7, 300))
    codec = layers(topk(1 / 4), int8, small=4)
    assert codec.fit(shapes).contraction(1 << 16) == codec.contraction(1 << 16) == 1 / 4
    assert codec.fit(shapes).variance(1 << 16) is None
    assert codec.fit(shapes).contraction(1600 + 40 + 2100) == pytest.approx(1 / 4)
    assert feedback(codec).fit(shapes) == feedback(codec.fit(shapes))

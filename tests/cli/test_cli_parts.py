import pytest

from thinwire.codecs import CODECS
from thinwire.config import named_methods
from thinwire.errors import ConfigError

METHODS = named_methods()


def test_all_methods_with_their_six_answers(call):
    code, out, _ = call("methods")
    assert code in (0, None)
    assert [name for name in METHODS if f"\n{name}  " not in f"\n{out}"] == []
    assert out.count("merged how?") == len(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_one_method(call, name):
    out = call("methods", name)[1]
    assert out.startswith(f"{name}(")
    assert "Source" in out


def test_all_codecs(call):
    out = call("codecs")[1]
    assert [name for name in CODECS if f"\n{name} " not in out] == []


@pytest.mark.parametrize("name", CODECS)
def test_one_codec(call, name):
    assert "bits an element" in call("codecs", name)[1]


def test_a_misspelt_one(call):
    with pytest.raises(ConfigError) as caught:
        call("codecs", "topkk")
    assert (caught.value.wrong, caught.value.mend) == ("there is no codec 'topkk'", "did you mean 'topk'?")
    with pytest.raises(ConfigError) as caught:
        call("methods", "dilocoo")
    assert (caught.value.wrong, caught.value.mend) == ("there is no method 'dilocoo'", "did you mean 'diloco'?")

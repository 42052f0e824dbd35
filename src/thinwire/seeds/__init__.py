"""Training by seeds and scalars: members say how far to go along directions that all of them can draw for themselves.

A direction z(seed) has an entry for every parameter, and any entry of it can be computed from the seed, the parameter's
name and the entry's place alone. So a step of the whole model is a few numbers, and a fine-tune is a list of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from thinwire.seeds.just_one_byte import just_one_byte
from thinwire.seeds.recipe import Recipe

#: Named recipes: what `thinwire train --method` may name beside the methods of six answers.
RECIPES: Mapping[str, Callable[..., Recipe]] = {"just_one_byte": just_one_byte}

__all__ = ["RECIPES", "Recipe", "just_one_byte"]

"""Merged how? Rules that turn the rows that arrived into one vector."""

from collections.abc import Callable, Mapping

from thinwire.aggregators.base import Aggregator, Needs
from thinwire.aggregators.majority import Majority
from thinwire.aggregators.mean import Mean, WeightedMean
from thinwire.aggregators.robust import Median, TrimmedMean
from thinwire.aggregators.signs import Signs

#: Every rule by the name used in expressions.
AGGREGATORS: Mapping[str, Callable[..., Aggregator]] = {
    "mean": Mean,
    "weighted_mean": WeightedMean,
    "trimmed_mean": TrimmedMean,
    "median": Median,
    "majority": Majority,
    "signs": Signs,
}

__all__ = ["AGGREGATORS", "Aggregator", "Majority", "Mean", "Median", "Needs", "Signs", "TrimmedMean", "WeightedMean"]

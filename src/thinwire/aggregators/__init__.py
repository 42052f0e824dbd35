"""Merged how? Rules that turn the rows that arrived into one vector."""

from thinwire.aggregators.base import Aggregator, Needs
from thinwire.aggregators.mean import Mean, WeightedMean
from thinwire.aggregators.robust import Median, TrimmedMean

#: Every rule by the name used in expressions.
AGGREGATORS = {"mean": Mean, "weighted_mean": WeightedMean, "trimmed_mean": TrimmedMean, "median": Median}

__all__ = ["AGGREGATORS", "Aggregator", "Mean", "Median", "Needs", "TrimmedMean", "WeightedMean"]

"""What to do on machines of given tiers: measure, predict, choose."""

from thinwire.plan.partition import Costs, Partition, Tier, islands, partition

__all__ = ["Costs", "Partition", "Tier", "islands", "partition"]

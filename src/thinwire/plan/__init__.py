"""What to do on machines of given tiers: measure, predict, choose."""

from thinwire.plan.partition import Costs, Partition, Tier, islands, partition
from thinwire.plan.shares import Shares, shares

__all__ = ["Costs", "Partition", "Shares", "Tier", "islands", "partition", "shares"]

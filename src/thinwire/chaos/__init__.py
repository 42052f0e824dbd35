"""Faults on a run that members join and leave, in the lab, and what they cost. See docs/chaos.md."""

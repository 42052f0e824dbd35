"""Who works on which samples, and which are done: a part of the committed state, the same on all members to the bit.

A *unit* is a micro-batch of samples, numbered from 0 through the epochs: unit u is of epoch u // units_per_epoch.
A *lease* gives a member units to work on until the next round. With the round that carries what was learnt from them
they are done; what a member did not come to, or had in hand when it was lost, goes back and is given out again.
"""

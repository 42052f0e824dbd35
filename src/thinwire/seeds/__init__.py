"""Training by seeds and scalars: members say how far to go along directions that all of them can draw for themselves.

A direction z(seed) has an entry for every parameter, and any entry of it can be computed from the seed, the parameter's
name and the entry's place alone. So a step of the whole model is a few numbers, and a fine-tune is a list of them.
"""

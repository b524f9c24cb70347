"""What a model can do, in numbers with their errors, and whether one is better than another.

Parts are imported by their names, since `results`, `estimates` and `comparing` need no torch.
"""

"""Microbatches under a plan: each rank computes its own, and the sum over all ranks is that of one process, bit by bit.

`total` is all that steps call. `shares` says who computes what, `gathering` runs a model whose parameters are split,
`small` exchanges metrics.
"""

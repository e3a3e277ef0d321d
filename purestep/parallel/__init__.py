"""Microbatches under a plan: each rank computes its own, and the sum over all ranks is that of one process, bit by bit.

`microbatches` is all that steps call. `assignment` says who computes what, `fsdp` runs a model whose parameters are
split, `small_exchange` exchanges metrics.
"""

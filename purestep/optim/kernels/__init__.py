"""Computation of updates: over lists of tensors, slice by slice, or by a fused kernel of torch."""

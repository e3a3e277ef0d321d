"""How an update is computed: lists of tensors at once, slice by slice, or by a fused kernel of torch."""

"""What is checked before the first batch: the step, the model and the batch on fake tensors, and device memory."""

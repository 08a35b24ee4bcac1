"""What is CUDA's only: the device, and graphs that are bound to their caller's tensors."""

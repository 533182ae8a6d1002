"""The plain twins of the kernels: torch alone, any device, any floating-point dtype, gradients by autograd."""

"""What several kernels share: packed layouts and pieces of device code."""

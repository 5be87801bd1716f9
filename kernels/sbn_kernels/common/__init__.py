"""What several kernels share, each thing once: packed layouts, argument checks, buffers, pieces of device code."""

"""The mathematics of the method in plain PyTorch: N:M patterns, ternary codes, and their autograd functions."""

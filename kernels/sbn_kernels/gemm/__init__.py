"""Products of int8 tokens and a ternary weight: one file or folder a kind of hardware, and the registry of them."""

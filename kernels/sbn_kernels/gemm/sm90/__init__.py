"""Hopper: dense ternary and 2:4 products with ``wgmma``, from weights of 2 bits each."""

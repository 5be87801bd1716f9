"""Hopper: dense ternary and 2:4 products with wgmma from 2-bit weights."""

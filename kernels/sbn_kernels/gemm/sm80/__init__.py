"""Products on 2-bit ternary weights by ``mma.sync`` and ``mma.sp.sync``: for Ampere, Ada and later GPUs."""

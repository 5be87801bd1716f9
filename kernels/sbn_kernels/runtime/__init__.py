"""How a kernel becomes a torch op, how it is launched, and what this GPU and this Triton can run."""

"""Products of many tokens, one file or folder a kind of hardware."""

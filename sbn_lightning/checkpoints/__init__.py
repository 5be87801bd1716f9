"""Checkpoints of a training run: writing them whole, reading them, resuming from them, consolidating shards."""

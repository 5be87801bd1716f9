"""Text to tokens to litdata shards: what ``sbn prepare`` does."""

"""Litdata shards to batches: loaders, mixtures, and the data module."""

"""Read litdata shards as batches: loaders, mixtures, and the data module."""

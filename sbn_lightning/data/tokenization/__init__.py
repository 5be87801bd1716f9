"""Turn text into tokens and tokens into litdata shards: what ``sbn prepare`` does."""

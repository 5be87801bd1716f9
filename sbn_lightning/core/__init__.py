"""What every other package may use: errors, and writing and reading files. This package imports none of them."""

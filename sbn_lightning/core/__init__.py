"""What every other package may use and what knows none of them: errors, and files that are whole or not there."""

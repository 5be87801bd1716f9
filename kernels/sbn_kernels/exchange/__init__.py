"""Ternary weights whose rows lie on several ranks: gamma from all ranks, and codes and masks at 2 bits a weight."""

"""Reads graphs and changes none: what is active, where the regions are, what is exact."""

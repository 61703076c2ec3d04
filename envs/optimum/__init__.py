"""Exact references: the most that any policy can reach, where it can be computed."""

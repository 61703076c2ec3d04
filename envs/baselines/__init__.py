"""The textbook's strategies as policies."""

"""The benchmark at the end of every run: the same fresh episodes for every contestant, and a verdict."""

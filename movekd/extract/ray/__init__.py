"""Build a cache on many machines with Ray."""

"""Pipeline 1: frozen teachers run once over a corpus; their features go to a cache."""

"""Pipeline 2: the student and the projector train against a cache; no teacher is loaded."""

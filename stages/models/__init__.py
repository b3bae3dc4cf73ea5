"""Networks of our own, and the registry of names."""

"""Endurance, faults and hostile clients: a short size of each test in `make test`, a slow one in `make test-slow`."""

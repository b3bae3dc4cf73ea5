"""Exact training of one part of a network, in steps that all stages commit or none."""

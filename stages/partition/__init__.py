"""Partitioning of networks into parts, and the weights of a part."""

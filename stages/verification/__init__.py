"""The check that the parts of a network, chained, compute what its own forward computes."""

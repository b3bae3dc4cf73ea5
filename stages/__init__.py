"""One part of a network (or one function) served by workers."""

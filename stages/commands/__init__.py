"""The commands `sparse stage` and `sparse cuts`."""

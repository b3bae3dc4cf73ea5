"""What takes long: the same tests have a short form in `make test` and a long one in `make soak`."""

"""The language between the processes of Sparse, and the line it travels on."""

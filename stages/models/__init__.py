"""Networks by name, and the code that prepares their inputs and interprets their outputs."""

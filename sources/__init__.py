"""Where samples come from, and who owns a request until its result is in."""

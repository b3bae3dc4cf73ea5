"""Networks from their factory and weights file, partitioned and checked: what a worker loads when it starts."""

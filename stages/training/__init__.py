"""Training one part of a network: exact, in steps that all stages take or none."""

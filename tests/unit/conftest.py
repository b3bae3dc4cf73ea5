"""Settings of property tests: no limit for one example, since other tests share the cores, and 50 examples for each."""

from hypothesis import settings

settings.register_profile("shared-cores", deadline=None, max_examples=50)
settings.load_profile("shared-cores")

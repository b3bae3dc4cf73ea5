"""Monitoring: live views, records of runs, figures."""

"""Campaigns: many faults at a time, each counted as right, traceback or silent. `make campaign` runs them all."""

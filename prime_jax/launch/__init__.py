"""Engines: where the workers of a sweep run. They never see runs; workers claim runs from ROOT."""

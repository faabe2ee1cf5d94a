"""Engines: start the workers of a sweep. Engines do not handle runs; workers claim them from ROOT."""

"""Engines: they start the workers of a sweep; the workers then claim runs from ROOT."""

"""Timing to be believed: interleaved pairs, an interval on every ratio, a stored fingerprint."""

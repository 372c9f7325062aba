"""Influence of one example on a student: the one-step update, the reference loss, estimators, scoring groups."""

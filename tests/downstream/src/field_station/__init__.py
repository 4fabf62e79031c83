"""Classifiers for sensors in the field, whose data drift."""

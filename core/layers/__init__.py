"""Shared maths of the model families."""

"""Compiled primitives that know nothing of gradients."""

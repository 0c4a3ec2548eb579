"""Quantised releases: which tensors hold a weight, and what its values are. One file per method of quantisation."""

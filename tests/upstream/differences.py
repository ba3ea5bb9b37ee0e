"""Upstream's tests in which ours does worse than a stock architecture, and why that is meant."""

DIFFERENCES = {}

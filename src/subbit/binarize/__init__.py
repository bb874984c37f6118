"""Weights to signs and scales: groups, salient columns, split points, SPBO."""

"""Costs: MACs, FLOPs, parameters, bytes and peak memory of a model."""

from squeeze.cost.layers import Layer, Profile, Totals, profile

__all__ = ["Layer", "Profile", "Totals", "profile"]

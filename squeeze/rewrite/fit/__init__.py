"""Closed-form weights: factors of a layer from its weights and its statistics."""

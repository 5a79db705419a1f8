"""Rewrites: each plans its changes, then applies them."""

"""Budgets: limits on what models cost, and the gate that holds them."""

"""Advantages, losses and their weights, behind one explicit table. Pure functions, importable without torch."""

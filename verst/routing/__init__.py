"""Recorded expert routes: what they look like, what makes them valid, and how they are laid beside the tokens of a forward pass."""

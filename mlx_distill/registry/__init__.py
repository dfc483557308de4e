"""Versions of models, the aliases that point to them, and the gates that guard a deployment."""

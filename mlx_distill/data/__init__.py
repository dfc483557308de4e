"""Rows of a user to batches of tokens: reading, checking, splitting, rendering, batching."""

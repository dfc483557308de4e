"""From anybody's rows to batches of tokens: reading, checking, splitting, rendering, batching."""

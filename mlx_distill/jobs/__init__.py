"""Commands that run in the background, one at a time: a queue, a subprocess each, an accelerator lease."""

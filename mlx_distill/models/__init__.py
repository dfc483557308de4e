"""Models on disk and in memory: load, convert, adapt, quantize, export."""

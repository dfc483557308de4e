"""Models: loading, conversion, adapters, quantization and export."""

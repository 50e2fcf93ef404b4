"""The Transformer and its parts. Knows no mesh, only logical axis names."""

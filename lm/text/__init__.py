"""Text in: tokenizers."""

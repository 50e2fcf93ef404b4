"""From sources of text to a versioned dataset, and from there to batches of token examples."""

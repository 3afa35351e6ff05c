"""Text to batches of tokens: sources, tokenizers, packed shards, and their order."""

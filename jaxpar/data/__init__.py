"""Text to tokens: sources, tokenizers, shards, windows, the split; and batches on devices."""

"""Text to blocks of tokens: sources, tokenizers, preparation, manifest, loader."""

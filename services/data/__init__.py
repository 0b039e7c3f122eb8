"""Text in, token windows out: sources, tokenizers, the token cache and the order of samples."""

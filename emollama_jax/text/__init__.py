"""Text: tokenizers, prompts, label sets and answer normalisation."""

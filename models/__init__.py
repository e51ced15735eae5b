"""The network and what it needs: weights, tokenizer, generation. Knows nothing of losses or data sets."""

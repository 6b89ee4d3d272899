"""The VAR transformer, the VQVAE tokenizer, and ElasticVAR, which joins them."""

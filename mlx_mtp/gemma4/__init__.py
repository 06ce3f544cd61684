"""The two networks of Gemma 4, target and drafter, with the K/V cache: arrays in, arrays out."""

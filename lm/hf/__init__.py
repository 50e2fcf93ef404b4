"""Weights of Hugging Face models in and out: what each family calls them, and the files they lie in."""

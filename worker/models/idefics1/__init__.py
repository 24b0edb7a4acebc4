"""IDEFICS, the first family: its prompts, image encoder, and text decoder with cross-attention to images."""

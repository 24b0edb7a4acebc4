"""Campaigns: a table of pictures in, the same table with the answers' columns out."""

"""The pictures of jobs: reading them from their sources, decoding, caching."""

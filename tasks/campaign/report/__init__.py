"""A campaign's output as one page for a browser."""

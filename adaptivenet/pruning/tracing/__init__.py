"""Traced functions: which units their arrays share, what is known of them, and smaller ones."""

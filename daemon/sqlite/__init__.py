"""Stores in SQLite files: the embedded shared store, and this host's own copy."""

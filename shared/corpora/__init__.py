"""Builders of corpora: each turns packages or files that a user has into training shards and evaluation sets."""

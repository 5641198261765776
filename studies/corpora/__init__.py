"""Builders of corpora: convert packages or a user's files to training shards and evaluation sets."""

"""Builders of corpora: shards to train on and evaluation sets. What trains and evaluates does not import them."""

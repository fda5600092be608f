"""Analyses, passes, pipelines, and what runs them."""

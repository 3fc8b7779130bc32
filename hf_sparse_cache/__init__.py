"""Exact sparse prefix caching for recurrent and hybrid language models."""

"""Evaluation harnesses with prefix reuse, and few-shot tasks of one's own."""

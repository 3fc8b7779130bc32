"""An OpenAI-style server on transformers' own serving classes, whose prompts resume from checkpoints.

`app` puts it together. A request comes in through `gate` (body, key, room in the line), is read by `requests`, becomes
a ticket (`tickets`), is answered by transformers' handlers over `inference`, and goes out through `replies`.
"""

"""OpenAI's routes: what its specification and its SDK expect, and TGI's extra forms."""

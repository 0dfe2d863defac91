"""Modules of the library replaced by faster equals. ``table.py`` lists them; each is checked against what it replaces."""

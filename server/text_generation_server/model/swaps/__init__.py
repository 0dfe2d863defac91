"""Modules of the library replaced by faster equals. ``table.py`` lists them, and checks each against the original."""

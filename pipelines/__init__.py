"""Runnable scripts: read a config, call the library, write a recipe."""

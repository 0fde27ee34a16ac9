"""Configs: one YAML for each thing that a user would run; every key commented."""

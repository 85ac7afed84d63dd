"""Offline half of PermLLM: decide where every weight goes, and write it down once."""

"""Exits, and the stage that hosts them beside its layers."""

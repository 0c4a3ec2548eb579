"""Calibrates exit thresholds so that the loss against full mode has a stated bound."""

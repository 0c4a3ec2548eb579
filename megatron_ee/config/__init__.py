"""Run configuration: dataclasses (schema), loading (load, strict), checks against the model (check, exits)."""

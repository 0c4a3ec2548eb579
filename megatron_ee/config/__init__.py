"""Run configuration: dataclasses (schema), loading (load), checks (check, exits, validation), untrusted files
(untrusted)."""

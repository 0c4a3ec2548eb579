"""Audits: a share of the requests under certificates also runs in full mode.

- ``auditor``: draws requests, counts their losses, and falls back after an alarm.
- ``comparison``: runs one audit on the engine.
- ``audit_file``: the state, which outlasts the server.
"""

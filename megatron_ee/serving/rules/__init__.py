"""Rules: how each request runs, by certificate, rules file, API key, and what it asks for itself.

- ``rules_file``: the file, as written by the operator.
- ``task_plans``: one plan per task, from the file and the certificates; ``safer_settings``: where it falls back to.
- ``rules``: the decision for one request.
"""

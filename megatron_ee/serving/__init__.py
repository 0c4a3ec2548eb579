"""The HTTP server: clients of OpenAI's API, early exit per request, certificates, and what the exits do.

A request goes down this list, and its response comes back up:

- ``server``, ``connection``, ``launch``: the process: sockets, signals, ranks.
- ``app``, ``guard``, ``service``: the application, what holds for every route, and what the routes use.
- ``routes/``: one file per group of paths; ``page/``: the web page.
- ``api/``: the bodies, and how they become requests of the engine.
- ``access``, ``limits``, ``rules/``: API keys, what each may use, and which requests leave early.
- ``generation``: one HTTP request from its arrival to its record; ``prompt_scores``: log-probabilities of prompts.
- ``writers``, ``streams``: the response, whole or in server-sent events.
- ``engine_loop``, ``submission``: the engine's thread, and requests in flight in it.

What is kept:

- ``exit_record``, ``exit_log``: one line per request; ``exits_report``: tables and plots of them.
- ``metrics``: for Prometheus.
- ``audits/``: whether the certificates are kept.
"""

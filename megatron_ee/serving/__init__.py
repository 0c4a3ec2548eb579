"""The HTTP server: clients of OpenAI's API, early exit per request, certificates, and what the exits do.

- ``protocol`` and ``answers``: bodies of requests and of their answers.
- ``translate``: from a body to a ``Request`` of the engine; ``responses`` and ``writers``: its tokens to an answer.
- ``generation``: one HTTP request from its admission to its end; ``records``: what is kept of it.
- ``service``: what the routes use; ``routes``: one file per group; ``app`` and ``guard``: all of it.
- ``engine_loop``: the engine's thread; ``server`` and ``launch``: the process.
- ``access`` and ``rules``: who may do what; ``audits``: whether certificates are kept; ``exit_log`` and ``metrics``.
"""

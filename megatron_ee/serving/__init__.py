"""The HTTP server: clients of OpenAI's API, early exit per request, certificates, and what the exits do."""

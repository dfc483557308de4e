"""The HTTP server: OpenAI's API, our own endpoints, and the dashboard. Needs the extra ``serve``."""

"""An engine for many at once: the HTTP API and the demo in the browser."""

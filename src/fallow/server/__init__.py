"""The OpenAI-compatible HTTP server."""

from __future__ import annotations

from fallow.server.app import create_app
from fallow.server.keys import load_api_keys
from fallow.server.process import serve
from fallow.server.replicas import serve_replicas
from fallow.server.settings import ServerSettings

__all__ = ["ServerSettings", "create_app", "load_api_keys", "serve", "serve_replicas"]
